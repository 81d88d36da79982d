"""From keep-sets to a checkpoint that other software loads, and the proof that it does."""
