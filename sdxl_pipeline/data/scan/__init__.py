"""Incremental scan of a dataset folder."""
