"""What the tests with real processes share."""

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
def no_process_outlives_its_test():
    """A test that fails half-way must not leave its processes to the others."""
    yield
    while Worker.started_here:
        worker = Worker.started_here.pop()
        pids = [int(path.read_text()) for path in worker.folder.glob("*.pid")]
        for pid in [worker.process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.process.wait()
