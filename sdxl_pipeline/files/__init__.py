"""Atomic files, digests, disk space and the layout of the storage folder."""
