"""Runs of the graph killed with SIGKILL while latents and checkpoints are written: the next run completes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sdxl_pipeline.definitions import REPOSITORY

COMMAND = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "sdxl_pipeline.definitions"]


class Runs:
    """Consecutive runs of one project from the command line, in a separate Dagster home."""

    def __init__(self, root: Path, project: Path, storage: Path) -> None:
        home = root / "home"
        home.mkdir()
        configuration = (REPOSITORY / "dagster.yaml").read_text()
        (home / "dagster.yaml").write_text(configuration.replace(".dagster", str(home / "dagster")))
        self.home, self.root = home, root
        self.environment = os.environ | {
            "DAGSTER_HOME": str(home),
            "SDXL_PIPELINE_PROJECTS": str(project.parent),
            "SDXL_PIPELINE_STORAGE": str(storage),
        }
        self.select = f'group:"{project.name}"'

    def start(self) -> tuple[subprocess.Popen, Path]:
        log = self.root / f"run-{time.time_ns()}.log"
        process = subprocess.Popen(
            [*COMMAND, "--select", self.select],
            env=self.environment,
            cwd=REPOSITORY,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        return process, log

    def processes(self) -> list[psutil.Process]:
        """Return every process of a run, found by the home in its environment."""
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            environment = process.info["environ"] or {}
            if environment.get("DAGSTER_HOME") == str(self.home) and process.info["status"] != "zombie":
                found.append(process)
        return found

    def kill(self, when: Callable[[], object], only_the_run: bool = False) -> None:
        """Start a run, kill all its processes or only the run's own once `when` is true, and wait until all have ended."""
        process, log = self.start()
        deadline = time.monotonic() + 400
        while not when():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for victim in [psutil.Process(process.pid)] if only_the_run else self.processes():
            victim.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while remaining := self.processes():
            assert time.monotonic() < deadline, remaining
            time.sleep(0.2)


@pytest.mark.slow
def test_graph_after_kills_during_writes_next_run_completes(
    make_project: Callable[..., Path], tmp_path: Path, isolated_storage: Path
) -> None:
    project = make_project(
        "killed",
        images=10,
        config={"max_train_steps": 30, "checkpoint_step_interval": 5, "evaluation_type": "none"},
    )
    runs = Runs(tmp_path, project, isolated_storage)
    latents = isolated_storage / "latents"
    runs.kill(lambda: list(latents.rglob(".*.tmp*")) or list(latents.glob("shards/*")))
    checkpoints = project / "output" / "lora"
    runs.kill(lambda: list(checkpoints.glob("*/checkpoints/.*.tmp")))
    runs.kill(lambda: len(list(checkpoints.glob("*/checkpoints/step-*"))) >= 3, only_the_run=True)
    process, log = runs.start()
    assert process.wait(600) == 0, log.read_text()
    output = log.read_text()
    assert "is marked as failed and its pool slots are free" in output
    assert "resumed from step" in output
