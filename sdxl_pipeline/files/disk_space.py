"""Disk space: what is reserved, what is refused before it is written, and the one sentence about a disk that is full."""

import errno
import os
import shutil
from pathlib import Path

from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS, StorageError

RESERVE_BYTES = 1 << 20
"""Kept free for what is written beside large files: headers, metrics, folders, the run history."""

ADVICE = (
    "Free some space, or use a folder on a larger disk, and run this again: what was finished before is kept."
)
_SPOKEN = ("No space left on device", "Disk quota exceeded", "os error 28", "database or disk is full")


class DiskFullError(StorageError, OSError):
    """A disk without room for what is to be written. An OSError too, for those who go on without it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def disk_full_message(
    path: Path, what: str, needed: int | None = None, advice: str = ADVICE, reserve: int = 0
) -> str:
    """Return the sentence: the disk by a path on it, what was to be written, and the bytes needed, kept in reserve and free.

    `needed` is None for what is not known before it is written; `reserve` is 0 where writing was tried to the last byte.
    """
    required = "an unknown size is" if needed is None else f"{size_text(needed)} are"
    kept = f"{size_text(reserve)} are" if reserve else "nothing is"
    return (
        f"no space left on the disk of {path} for {what}: {required} needed, {kept} kept in reserve, and "
        f"{size_text(free_bytes(path))} are free. {advice}"
    )


def hub_cache_full_message(cache: Path, what: str, needed: int | None = None) -> str:
    """Return the sentence about the disk of the Hugging Face Hub's cache."""
    advice = "Free some space, or set HF_HOME to a folder on a larger disk, and run this again: files that have come whole are kept."
    return disk_full_message(cache, what, needed, advice)


def require_space(folder: Path, needed: int, what: str, advice: str = ADVICE) -> None:
    """Raise DiskFullError when `needed` bytes and the reserve do not fit, so that the disk is not filled by half of `what`."""
    if free_bytes(folder) < needed + RESERVE_BYTES:
        raise DiskFullError(disk_full_message(folder, what, needed, advice, RESERVE_BYTES))


def describe_disk_full(error: BaseException, folder: Path, what: str) -> str:
    """Return the sentence about an error for which `is_disk_full` holds; `folder` counts where the error names no file."""
    if isinstance(error, DiskFullError):
        return str(error)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return disk_full_message(Path(os.fsdecode(name)) if isinstance(name, str | bytes) else folder, what)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is about a full disk or quota. Some libraries report that in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        if not isinstance(error, OSError) and any(words in str(error) for words in _SPOKEN):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk of a path, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def size_text(count: int) -> str:
    """Bytes in the unit that suits them, powers of 1024 as in the settings: "3.2 GiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
