"""Leases: which entries of a store running processes use.

A lease is a file that its process holds a lock on. The operating system releases the lock when the process ends, however it ends, so a
lease is live exactly as long as its process; dead leases are deleted by the next reader. Leases are acquired and read under the store's
lock: a prune either sees a lease or finishes before it starts.
"""

import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import lock_descriptor

from sdxl_pipeline.cache.store.store_index import KEY_BYTES
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS

_SUFFIX = ".lease"


@dataclass(frozen=True)
class Lease:
    """Entries that a process protects from deletion."""

    holder: str
    """Purpose, process and machine, for display."""
    since_ns: int
    """When it was acquired, by the file system's clock."""
    writes: bool
    """Its process adds entries: none written since it was acquired may be deleted."""
    keys: np.ndarray | None
    """Packed keys of the entries in use; None: all."""


@contextmanager
def hold_lease(
    folder: Path, lock: AbstractContextManager[None], keys: np.ndarray, *, purpose: str, writes: bool
) -> Iterator[None]:
    """Hold a lease on the entries `keys` while the block runs. `lock` is the store's, held only while the lease is written.

    For a read-only store of a process that only reads, the block runs without a lease.
    """
    name = f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}{_SUFFIX}"
    holder_info = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "writes": writes}
    path = folder / name
    descriptor = -1
    try:
        with lock:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            lock_descriptor(descriptor)
            _write(descriptor, json.dumps(holder_info).encode() + b"\n" + keys.tobytes())
    except OSError as error:
        if writes or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    try:
        yield
    finally:
        if descriptor >= 0:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def live_leases(folder: Path) -> list[Lease]:
    """Return the leases of living processes and delete those of dead ones. The store's lock is held."""
    leases = []
    for path in sorted(folder.glob(f"[!.]*{_SUFFIX}")):
        with suppress(FileNotFoundError), _open_for_lock_test(path) as file:  # its process has just ended
            # Exclusive: under the store's lock no other process tests the lease at the same time.
            if lock_descriptor(file.fileno(), blocking=False):
                path.unlink(missing_ok=True)
            else:
                leases.append(_read(file.read(), os.fstat(file.fileno()).st_mtime_ns, path.name))
    return leases


def _open_for_lock_test(path: Path) -> BinaryIO:
    """Open a lease to test its lock: on NFS that requires write permission, elsewhere read permission."""
    try:
        return path.open("r+b")
    except PermissionError:
        return path.open("rb")


def oldest_writer_ns(leases: Iterable[Lease], default: int) -> int:
    """Return when the oldest active writer acquired its lease, or `default`."""
    return min((lease.since_ns for lease in leases if lease.writes), default=default)


def _write(descriptor: int, content: bytes) -> None:
    """Write the whole content, or, on a full disk, nothing: an empty lease needs no space and covers every entry."""
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        os.ftruncate(descriptor, 0)


def _read(content: bytes, since_ns: int, name: str) -> Lease:
    head, _, keys = content.partition(b"\n")
    try:
        holder_info = json.loads(head)
        holder = f"{holder_info['purpose']} (process {holder_info['pid']} on {holder_info['host']})"
        if len(keys) % KEY_BYTES == 0:
            packed = np.sort(np.frombuffer(keys, dtype=f"S{KEY_BYTES}"))
            return Lease(holder, since_ns, bool(holder_info["writes"]), packed)
    except (ValueError, KeyError, TypeError):
        pass
    # Written by another version, or on a full disk: its process is alive, so treat every entry as in use.
    return Lease(f"the holder of {name}", since_ns, True, None)
