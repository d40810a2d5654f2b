"""Data sets: the BEIR layout, record schemas, the bundled demo set."""
