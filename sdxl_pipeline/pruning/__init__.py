"""Freeing what no project refers to."""
