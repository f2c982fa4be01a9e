"""Captions: where they are read from, filters and shuffles."""
