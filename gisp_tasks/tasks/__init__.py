"""One file per DAG task: refs in, refs out."""
