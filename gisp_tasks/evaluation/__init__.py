"""Measures of a checkpoint: token perplexity and lm-eval tasks."""
