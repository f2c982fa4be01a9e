"""The two configuration files, read into validated settings."""
