"""Liveness: a run is dead once all its processes are known to have ended, and only then."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from sdxl_pipeline.runtime import process_liveness
from sdxl_pipeline.runtime.process_liveness import forget_run, hold_liveness, inspect_runs
from tests.support.processes import wait_for


def hold_until_killed(run: Path) -> None:
    hold_liveness(run)
    signal.pause()


def dead_by_run(folder: Path) -> dict[str, bool]:
    with inspect_runs(folder) as runs:
        return {run.run_id: run.is_dead for run in runs}


def test_run_is_dead_once_its_last_process_is_killed(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=hold_until_killed, args=(tmp_path / "run",))
        for _ in range(2)
    ]
    try:
        for process in processes:
            process.start()
        wait_for(lambda: len(list(tmp_path.glob("run/*.process"))) == 2, 10, "both processes hold")
        for process in processes:
            assert dead_by_run(tmp_path) == {"run": False}
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    finally:
        for process in processes:
            process.kill()
    assert dead_by_run(tmp_path) == {"run": True}
    forget_run(tmp_path, "run")
    assert dead_by_run(tmp_path) == {}


def write_ended_process_file(run: Path, **about: object) -> None:
    """Write the liveness file of an ended process."""
    run.mkdir(parents=True)
    (run / "1-00.process").write_text(
        json.dumps({"pid": 1, "host": socket.gethostname(), "boot": "", **about})
    )


@pytest.mark.parametrize(
    ("host", "boot", "dead"),
    [
        (socket.gethostname(), "", True),
        (socket.gethostname(), "of before the power cut", True),
        ("another-container", "this", True),
        ("another-machine", "that", False),
        ("another-machine", "", False),
    ],
)
def test_run_with_a_free_lock_on_another_machine_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, boot: str, dead: bool
) -> None:
    monkeypatch.setattr(process_liveness, "_boot_id", lambda: "this")
    write_ended_process_file(tmp_path / "run", host=host, boot=boot)
    assert dead_by_run(tmp_path) == {"run": dead}


def test_run_with_a_reused_pid_is_dead(tmp_path: Path) -> None:
    write_ended_process_file(tmp_path / "run", pid=os.getpid())
    assert dead_by_run(tmp_path) == {"run": True}


def test_truncated_file_counts_by_its_lock_and_run_without_files_is_omitted(tmp_path: Path) -> None:
    (tmp_path / "starting").mkdir()
    write_ended_process_file(tmp_path / "cut")
    (tmp_path / "cut" / "1-00.process").write_text('{"pid": 1')
    assert dead_by_run(tmp_path) == {"cut": True}
    assert dead_by_run(tmp_path / "none") == {}
