"""Files that are either whole or absent: written beside their target, flushed to disk, then renamed over it."""

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
_UNFINISHED = re.compile(r"\..+\.(?P<pid>\d+)(-[0-9a-f]+)?\.tmp(\..+)?")


@contextmanager
def atomic_path(path: Path, size: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, it is renamed to `path`.

    Whatever the block wrote is flushed to disk before the rename, so that neither a kill nor a power cut leaves half a file under
    the final name. The folder is made if need be. When the block raises, or writes nothing, `path` is left as it was; the latter
    raises FileNotFoundError. A full disk raises DiskFullError, which gives `size`, the bytes to write, where that is known.

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


def unfinished(folder: Path) -> Iterator[Path]:
    """Temporary files and folders anywhere under a folder: of writers at work, or left by killed ones."""
    return (path for path in folder.rglob(".*.tmp*") if _UNFINISHED.fullmatch(path.name))


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files and folders that killed writers left under a folder; those of living processes stay.

    For a folder with one writer at a time, which calls this before it begins: on a shared disk, a pid says nothing about other machines.
    """
    for path in list(unfinished(folder)):
        name = _UNFINISHED.fullmatch(path.name)
        if name is None or psutil.pid_exists(int(name["pid"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a crash at any moment the file holds the old bytes or the new ones."""
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8, with its line ends unchanged, as `write_bytes_atomic` does."""
    write_bytes_atomic(path, text.encode())


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in pieces so that a file larger than memory is no matter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_path(path: Path) -> str:
    """`sha256_file` of a file; of a folder the digest of its files' names and contents, in the form that `sha256sum` prints."""
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make `target` the file `source` by a hard link, or by a copy where the file system has none. For files that are never written to."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flush(path: Path) -> None:
    """Ask the disk to keep a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
