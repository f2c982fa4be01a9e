"""Disks that are really full: a small file system in a process's own mount namespace, which ends with it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x20000
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18
_CANNOT_MOUNT = 77


def mount_small_disk(folder: Path | str, size: str) -> None:
    """Mount a tmpfs of a size such as "2m" over a folder; exit if that is not permitted. For programs of `run_on_small_disk`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    ):
        sys.stderr.write(f"cannot mount: {os.strerror(ctypes.get_errno())}")
        sys.exit(_CANNOT_MOUNT)


def enlarge_disk(folder: Path | str, size: str) -> None:
    """Resize the file system mounted by `mount_small_disk`."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_REMOUNT, f"size={size}".encode()) == 0


def run_on_small_disk(program: str, *arguments: Path, timeout: float = 300) -> str:
    """Return the output of a Python program that calls `mount_small_disk`; skip the test where nothing can be mounted."""
    if sys.platform != "linux":
        pytest.skip("mounts a tmpfs, which takes Linux")
    command = [sys.executable, "-c", program, *map(str, arguments)]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--mount", *command]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        pytest.skip("neither root nor `unshare` to mount a tmpfs with")
    if run.returncode == _CANNOT_MOUNT or "unshare" in run.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {run.stdout}{run.stderr}")
    assert run.returncode == 0, run.stderr
    return run.stdout
