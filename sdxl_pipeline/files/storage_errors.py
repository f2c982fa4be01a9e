"""User-fixable errors of the storage folder."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk or an exceeded quota."""


class StorageError(Exception):
    """A store entry is missing or unreadable, or a store cannot be written. The message says how to fix it."""


class CorruptEntryError(StorageError):
    """Store entries whose bytes do not match their checksum. They were removed from the index."""

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


@contextmanager
def ignore_full_disk() -> Iterator[None]:
    """Suppress errors of a full disk; re-raise any other OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
