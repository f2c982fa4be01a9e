"""Sharded models and synchronization of processes."""
