"""The numbers as pure functions: no clock, no network, no environment."""
