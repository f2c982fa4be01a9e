"""Near duplicates and contact sheets."""
