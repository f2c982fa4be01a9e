"""Rules for combinations of settings."""
