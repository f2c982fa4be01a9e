"""Errors of the storage folder that a user can fix."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a disk, or a quota, that is full."""


class StorageError(Exception):
    """An entry that is not there or cannot be read, or a store that cannot be written. The message says what to do."""


class DamagedEntryError(StorageError):
    """Entries whose bytes are not those that were written. They have been removed from the index."""

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


@contextmanager
def ignore_full_disk() -> Iterator[None]:
    """Go on when a disk is full; any other failure is raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
