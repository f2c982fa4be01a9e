"""A stage that only counts, and fails in the way its spec selects: the child process in tests of stage runner and launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sdxl_pipeline.files.storage_errors import StorageError
from sdxl_pipeline.runtime.reporter import Reporter, is_main_process
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError, run_stage

STEP_SECONDS = 0.02


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's exception."""


class SleepySpec(BaseModel):
    model_config = ConfigDict(extra="forbid")

    folder: Path
    steps: int = 5
    ending: Literal["done", "user", "store", "crash", "out_of_memory", "killed"] = "done"
    stubborn: bool = False
    save_seconds: float = 0.0
    helper: bool = False
    wait_for: Path | None = None


class SleepyManifest(BaseModel):
    steps: int
    environment: dict[str, str]


def main(spec: SleepySpec, reporter: Reporter, stop: StopSignal) -> SleepyManifest:
    """Count to `steps`, and save the count on a stop request."""
    rank = os.environ.get("RANK", "0")
    while spec.wait_for and not spec.wait_for.exists():
        time.sleep(STEP_SECONDS)
    if spec.helper:
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note(spec.folder / f"helper-{rank}.pid", helper.pid)
    with (spec.folder / "starts").open("a") as starts:
        starts.write("x")
    note(spec.folder / f"stage-{rank}.pid", os.getpid())
    sys.stdout.write(f"stdout of rank {rank}\n")
    for step in range(1, spec.steps + 1):
        if stop.requested and not spec.stubborn:
            note(spec.folder / "saving", step)
            time.sleep(spec.save_seconds)
            note(spec.folder / "saved", step)
            raise StageStopped
        reporter.progress("count", step, spec.steps, "steps")
        reporter.metric(step, {"loss": 1 / step})
        time.sleep(STEP_SECONDS)
    reporter.log("counted")
    reporter.image("dot", spec.folder / "dot.png", caption="a dot", step=spec.steps)
    match spec.ending:
        case "user":
            raise UserError("steps: 7 is unlucky; write 8")
        case "store":
            raise StorageError("no space left on the moon")
        case "crash":
            raise RuntimeError("the floor gave way")
        case "out_of_memory":
            raise OutOfMemoryError("tried to allocate 80 GiB")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if not is_main_process():
        note(spec.folder / f"done-{rank}", spec.steps)
    return SleepyManifest(steps=spec.steps, environment=dict(os.environ))


def note(path: Path, number: int) -> None:
    """Write a number atomically, so that a test never reads an incomplete file."""
    path.with_suffix(".part").write_text(str(number))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    run_stage(SleepySpec, main)
