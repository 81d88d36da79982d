"""Where text comes from, and how it becomes calibration tokens."""
