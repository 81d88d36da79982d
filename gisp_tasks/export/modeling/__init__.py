"""The short modelling files that travel with a checkpoint, one a family; they import transformers only."""
