"""Leases: which entries of a store are in use, said by the processes that use them.

A lease is a file on which its process holds a lock. The system lets go of the lock when the process dies, however it dies, so a lease is
live exactly as long as its process needs it; dead ones are swept away by whoever looks. Leases are taken and looked at under the
store's lock: a prune either sees a lease or is over before it begins.
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
    """What a process has asked to be left alone."""

    holder: str
    """Purpose, process and machine, as a person reads them."""
    since_ns: int
    """When it was taken, on the clock of the disk."""
    writes: bool
    """It adds entries: none that was written since it was taken may go."""
    keys: np.ndarray | None
    """Packed keys of the entries it relies on; None: all of them."""


@contextmanager
def held_lease(
    folder: Path, lock: AbstractContextManager[None], keys: np.ndarray, *, purpose: str, writes: bool
) -> Iterator[None]:
    """Hold a lease on the entries `keys` while the block runs. `lock` is the store's, and held only while the lease is written.

    In a store that this process may not write to, nor has to, the block runs without one.
    """
    name = f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}{_SUFFIX}"
    about = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "writes": writes}
    path = folder / name
    descriptor = -1
    try:
        with lock:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            lock_descriptor(descriptor)
            _write(descriptor, json.dumps(about).encode() + b"\n" + keys.tobytes())
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
    """The leases that living processes hold; the files of dead ones are deleted. The store's lock is held."""
    leases = []
    for path in sorted(folder.glob(f"[!.]*{_SUFFIX}")):
        with suppress(FileNotFoundError), _opened(path) as file:  # its process is just done
            # Exclusive, although this only asks: under the store's lock nobody else asks at the same time.
            if lock_descriptor(file.fileno(), blocking=False):
                path.unlink(missing_ok=True)
            else:
                leases.append(_read(file.read(), os.fstat(file.fileno()).st_mtime_ns, path.name))
    return leases


def _opened(path: Path) -> BinaryIO:
    """Open a lease for the question whether it is locked: on NFS that takes the right to write, elsewhere the right to read."""
    try:
        return path.open("r+b")
    except PermissionError:
        return path.open("rb")


def oldest_writer_ns(leases: Iterable[Lease], default: int) -> int:
    """When the writer at work longest took its lease."""
    return min((lease.since_ns for lease in leases if lease.writes), default=default)


def _write(descriptor: int, content: bytes) -> None:
    """Write the whole content, or, on a full disk, nothing: an empty lease is one on everything, and needs no room."""
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
        about = json.loads(head)
        holder = f"{about['purpose']} (process {about['pid']} on {about['host']})"
        if len(keys) % KEY_BYTES == 0:
            packed = np.sort(np.frombuffer(keys, dtype=f"S{KEY_BYTES}"))
            return Lease(holder, since_ns, bool(about["writes"]), packed)
    except (ValueError, KeyError, TypeError):
        pass
    # Written by another version, or on a full disk: its process lives, so whatever it needs is left alone.
    return Lease(f"the holder of {name}", since_ns, True, None)
