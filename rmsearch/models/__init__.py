"""Model folders: what is in them, how they must be used, and their heads."""
