"""Captions: text files, tables, filters and shuffling."""
