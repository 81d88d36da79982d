"""DAG files. A scheduler reads them as plain files; nothing imports this package."""
