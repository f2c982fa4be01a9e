"""The run's lock: never two trainers in one folder, and never one kept out by a dead one."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.run_lock import run_lock


def hold_the_lock(run_dir: Path, held: Path) -> None:
    with run_lock(run_dir, StopSignal()):
        held.touch()
        time.sleep(60)


def test_two_trainers_never_share_a_run(tmp_path):
    run_dir, held = tmp_path / "run", tmp_path / "held"
    other = multiprocessing.get_context("fork").Process(target=hold_the_lock, args=(run_dir, held))
    other.start()
    try:
        while not held.exists():
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
