"""The run lock: never two trainers in one run folder, and a dead process never holds the lock."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.run_lock import run_lock


def hold_lock(run_dir: Path, acquired: Path) -> None:
    with run_lock(run_dir, StopSignal()):
        acquired.touch()
        time.sleep(60)


def test_run_lock_excludes_other_processes_and_is_released_on_death(tmp_path):
    run_dir, acquired = tmp_path / "run", tmp_path / "acquired"
    other = multiprocessing.get_context("fork").Process(target=hold_lock, args=(run_dir, acquired))
    other.start()
    try:
        while not acquired.exists():
            time.sleep(0.01)
        with (
            pytest.raises(UserError, match=f"process {other.pid}.*is running in"),
            run_lock(run_dir, StopSignal(), timeout=0.0),
        ):
            pytest.fail("two trainers hold one run")
        stop = StopSignal()
        stop.request()
        with pytest.raises(StageStopped), run_lock(run_dir, stop):
            pytest.fail("two trainers hold one run")
    finally:
        os.kill(other.pid or 0, signal.SIGKILL)
        other.join()
    with run_lock(run_dir, StopSignal(), timeout=5.0):
        assert (run_dir / ".lock").read_text() == f"{os.getpid()}\n"
