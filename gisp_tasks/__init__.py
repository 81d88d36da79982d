"""GISP: global iterative structured pruning as a pipeline of small, repeatable tasks."""

__version__ = "0.1.0"
