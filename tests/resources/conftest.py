"""Fixtures of the tests with real processes."""

import contextlib
import os
import signal

import pytest

from tests.resources.worker import Worker


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SLEEPY_WORK_DIR", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def kill_leftover_processes():
    """Kill the processes of a failed test, so that they do not affect others."""
    yield
    while Worker.instances:
        worker = Worker.instances.pop()
        pids = [int(path.read_text()) for path in worker.folder.glob("*.pid")]
        for pid in [worker.process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.process.wait()
