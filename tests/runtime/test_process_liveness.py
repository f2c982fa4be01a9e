"""Which runs count as dead: those whose processes are known to have ended, and no others."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from sdxl_pipeline.runtime import process_liveness
from sdxl_pipeline.runtime.process_liveness import examined_runs, forget_run, hold_liveness
from tests.support.processes import wait_for


def hold(run: Path) -> None:
    hold_liveness(run)
    signal.pause()


def examine(folder: Path) -> dict[str, bool]:
    with examined_runs(folder) as runs:
        return {run.run_id: run.is_dead for run in runs}


def test_a_run_is_dead_once_the_last_of_its_processes_is_killed(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run",)) for _ in range(2)
    ]
    try:
        for process in processes:
            process.start()
        wait_for(lambda: len(list(tmp_path.glob("run/*.process"))) == 2, 10, "both processes hold")
        for process in processes:
            assert examine(tmp_path) == {"run": False}
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    finally:
        for process in processes:
            process.kill()
    assert examine(tmp_path) == {"run": True}
    forget_run(tmp_path, "run")
    assert examine(tmp_path) == {}


def leave_file(run: Path, **about: object) -> None:
    """A file as of an ended process."""
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
def test_a_free_lock_proves_nothing_about_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, boot: str, dead: bool
) -> None:
    monkeypatch.setattr(process_liveness, "_boot_id", lambda: "this")
    leave_file(tmp_path / "run", host=host, boot=boot)
    assert examine(tmp_path) == {"run": dead}


def test_pid_of_a_living_process_does_not_keep_an_ended_run(tmp_path: Path) -> None:
    leave_file(tmp_path / "run", pid=os.getpid())
    assert examine(tmp_path) == {"run": True}


def test_a_cut_file_counts_by_its_lock_and_a_run_without_files_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "starting").mkdir()
    leave_file(tmp_path / "cut")
    (tmp_path / "cut" / "1-00.process").write_text('{"pid": 1')
    assert examine(tmp_path) == {"cut": True}
    assert examine(tmp_path / "none") == {}
