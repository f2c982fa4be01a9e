"""Atomic file writes: to a temporary file beside the target, flushed to disk, then renamed over it."""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sdxl_pipeline.files.disk_space import DiskFullError, disk_full_message
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS

_CHUNK = 1 << 20
_TEMPORARY_NAME = re.compile(r"\..+\.(?P<pid>\d+)(-[0-9a-f]+)?\.tmp(\..+)?")


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` when the block succeeds.

    What the block wrote is flushed to disk before the rename, so that neither a kill nor a power failure leaves a partial file under the
    final name. The folder is created if needed. When the block raises or writes nothing, `path` is unchanged; the latter raises
    FileNotFoundError. A full disk raises DiskFullError, which reports `size`, the bytes to write, if given.

    The temporary name keeps the suffix of `path`, for libraries that choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS and not isinstance(error, DiskFullError):
            raise DiskFullError(disk_full_message(path.parent, path.name, size)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def find_unfinished(folder: Path) -> Iterator[Path]:
    """Return temporary files and folders anywhere under a folder: of active writers, or left by killed ones."""
    return (path for path in folder.rglob(".*.tmp*") if _TEMPORARY_NAME.fullmatch(path.name))


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files and folders that killed writers left under a folder; those of living processes stay.

    For a folder with one writer at a time, before it starts writing: on a shared disk, pids of other machines cannot be checked.
    """
    for path in list(find_unfinished(folder)):
        name = _TEMPORARY_NAME.fullmatch(path.name)
        if name is None or psutil.pid_exists(int(name["pid"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: after a crash at any time the file holds the old bytes or the new ones."""
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` atomically as UTF-8, without newline translation."""
    write_bytes_atomic(path, text.encode())


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content, read in chunks so that the file may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_path(path: Path) -> str:
    """Return `sha256_file` of a file; of a folder the digest of its `sha256sum` lines (each file's digest and relative path)."""
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has none. For files that are never modified."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
