"""Rules that combine several settings."""
