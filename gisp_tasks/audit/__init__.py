"""`gisp verify`: a finished run, read again from its store and held against its own record."""
