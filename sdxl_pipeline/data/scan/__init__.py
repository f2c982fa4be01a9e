"""Scan of a dataset folder, incremental from the recorded one."""
