"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

DEAD_PID = 2**22 + 1
"""Larger than Linux gives to any process."""


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Look every 50 ms whether a condition holds; fails the test when it still does not after so many seconds."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"after {seconds} s still not: {what}"
        time.sleep(0.05)


def wait_for_number(path: Path, seconds: float = 60) -> int:
    """The number in a file, as soon as the file is there."""
    wait_for(path.exists, seconds, f"{path.name} written")
    return int(path.read_text())


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie (whose parent has not yet asked how it ended)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
