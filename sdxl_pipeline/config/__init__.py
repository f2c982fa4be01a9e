"""Configuration: the two files of a project, parsed into validated settings."""
