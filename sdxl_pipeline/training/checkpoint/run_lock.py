"""A lock that allows one trainer per run. Imports no torch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError

LOCK = ".lock"
LOCK_POLL_SECONDS = 0.5
LOCK_TIMEOUT_SECONDS = 180.0


@contextmanager
def run_lock(run_dir: Path, stop: StopSignal, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Hold the exclusive lock on a run's folder within the context. The kernel releases it when the process ends, however it ends.

    Wait for a trainer that was stopped and is still saving; raise UserError if another holds the lock for more than `timeout` seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with (run_dir / LOCK).open("a+") as lock:
        while not lock_descriptor(lock.fileno(), blocking=False):
            stop.raise_if_requested()
            if time.monotonic() >= deadline:
                lock.seek(0)
                raise UserError(
                    f"another trainer (process {lock.read().strip() or 'unknown'}) is running in {run_dir}; "
                    "wait for it to end, or stop it"
                )
            time.sleep(LOCK_POLL_SECONDS)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
