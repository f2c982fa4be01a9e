"""Free disk space: the reserve, checks before writing, and the error message about a full disk."""

import errno
import os
import shutil
from pathlib import Path

from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS, StorageError

RESERVE_BYTES = 1 << 20
"""Kept free for small files written beside large ones: headers, metrics, folders, the run history."""

ADVICE = "Free some space, or use a folder on a larger disk, and run this again: results finished before are retained."
_DISK_FULL_PHRASES = (
    "No space left on device",
    "Disk quota exceeded",
    "os error 28",
    "database or disk is full",
)


class DiskFullError(StorageError, OSError):
    """The disk has too little free space. Also an OSError, for callers that continue without the file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def disk_full_message(
    path: Path, what: str, needed: int | None = None, advice: str = ADVICE, reserve: int = 0
) -> str:
    """Return the error message: the disk (by a path on it), what was being written, and the bytes needed, reserved and free.

    Pass None as `needed` when the size is unknown before writing; `reserve` is 0 where writing itself failed.
    """
    required = "an unknown size is" if needed is None else f"{format_size(needed)} are"
    reserved = f"{format_size(reserve)} are" if reserve else "nothing is"
    return (
        f"no space left on the disk of {path} for {what}: {required} needed, {reserved} kept in reserve, and "
        f"{format_size(free_bytes(path))} are free. {advice}"
    )


def hub_cache_full_message(cache: Path, what: str, needed: int | None = None) -> str:
    """Return the error message about a full disk of the Hugging Face Hub cache."""
    advice = "Free some space, or set HF_HOME to a folder on a larger disk, and run this again: completed files are retained."
    return disk_full_message(cache, what, needed, advice)


def require_space(folder: Path, needed: int, what: str, advice: str = ADVICE) -> None:
    """Raise DiskFullError unless `needed` bytes plus the reserve are free, before a partial `what` fills the disk."""
    if free_bytes(folder) < needed + RESERVE_BYTES:
        raise DiskFullError(disk_full_message(folder, what, needed, advice, RESERVE_BYTES))


def describe_disk_full(error: BaseException, folder: Path, what: str) -> str:
    """Return the message about an error for which `is_disk_full` is true; `folder` is used if the error has no file name."""
    if isinstance(error, DiskFullError):
        return str(error)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return disk_full_message(Path(os.fsdecode(name)) if isinstance(name, str | bytes) else folder, what)


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes is about a full disk or quota. Some libraries report that only as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return True
        if not isinstance(error, OSError) and any(phrase in str(error) for phrase in _DISK_FULL_PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds a path, which need not exist yet."""
    return shutil.disk_usage(next(existing for existing in (path, *path.parents) if existing.exists())).free


def format_size(count: int) -> str:
    """Return a size in the unit that fits it, in powers of 1024 as in the settings: "3.2 GiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
