"""Work of several processes of one stage: rank 0 plans it and gathers the results.

They communicate through files in a folder beside the stage's result, each written atomically: torchrun's processes of one machine share
its disk, as they share the store. No process blocks in a library call, so a waiting process notices a stop at once.
"""

import os
import shutil
import time
from pathlib import Path

from sdxl_pipeline.files.atomic_files import write_bytes_atomic
from sdxl_pipeline.runtime.stage_runner import StopSignal

POLL_SECONDS = 0.05
_PLAN = "plan"


class Ranks:
    """Rank `rank` of the `count` processes of a stage, from torchrun's environment; without it the only process."""

    def __init__(self, result: Path, stop: StopSignal) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._stop = stop
        # One folder per launch, so that files of an earlier launch are not read.
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        self._folder = result.with_name(f".{result.stem}.ranks-{launch}")
        self._stale_pattern = f".{result.stem}.ranks-*"

    @property
    def is_main(self) -> bool:
        """Whether this process plans and gathers."""
        return self.rank == 0

    def broadcast(self, plan: bytes) -> None:
        """Send the plan to the other processes. Called once, by rank 0."""
        if self.count > 1:
            for stale in self._folder.parent.glob(self._stale_pattern):
                shutil.rmtree(stale, ignore_errors=True)
            write_bytes_atomic(self._folder / _PLAN, plan)

    def receive(self) -> bytes:
        """Return the plan from rank 0. Raises StageStopped if a stop is requested first."""
        return self._wait_for(_PLAN)

    def gather(self, result: bytes) -> list[bytes] | None:
        """Return the results of all processes in rank order on rank 0; None on the other ranks, which do not wait.

        Raises StageStopped if a stop is requested first, which also happens when another process fails.
        """
        if not self.is_main:
            write_bytes_atomic(self._folder / f"rank-{self.rank}", result)
            return None
        results = [result, *(self._wait_for(f"rank-{rank}") for rank in range(1, self.count))]
        shutil.rmtree(self._folder, ignore_errors=True)
        return results

    def _wait_for(self, name: str) -> bytes:
        path = self._folder / name
        while not path.exists():
            self._stop.raise_if_requested()
            time.sleep(POLL_SECONDS)
        return path.read_bytes()
