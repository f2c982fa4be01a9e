"""A process that materializes the sleepy asset, which tests stop or kill."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from tests.stages.sleepy_stage import SleepySpec
from tests.support.processes import runs, wait_for, wait_for_number

REPOSITORY = Path(__file__).parents[2]


class Worker:
    """A process that materializes the sleepy asset, and its descendants."""

    instances: ClassVar[list["Worker"]] = []

    def __init__(
        self, spec: SleepySpec, work_dir: Path, command: list[str] | None = None, **environment: str
    ):
        self.folder = spec.folder
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "tests.resources.sleepy_asset"],
            cwd=REPOSITORY,
            env={**os.environ, "SLEEPY_SPEC": spec.model_dump_json(), **environment},
            stdout=(spec.folder / "worker.out").open("w"),
            stderr=subprocess.STDOUT,
        )
        self.instances.append(self)

    def started(self, *names: str) -> list[int]:
        """Wait for the pids recorded under these names and return them."""
        return [wait_for_number(self.folder / f"{name}.pid", seconds=180) for name in names]

    def end(self, seconds: float = 60) -> int:
        return self.process.wait(timeout=seconds)

    @property
    def output(self) -> str:
        return (self.folder / "worker.out").read_text()


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    wait_for(lambda: not any(runs(pid) for pid in pids), seconds, f"processes {pids} gone")
