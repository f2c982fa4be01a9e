"""Waiting for other processes."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

DEAD_PID = 2**22 + 1
"""Above Linux's maximum pid."""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Check a condition every 50 ms; fail the test if it does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.05)


def wait_for_number(path: Path, seconds: float = 60) -> int:
    """Return the number in a file once the file exists."""
    wait_for(path.exists, seconds, f"{path.name} written")
    return int(path.read_text())


def runs(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
