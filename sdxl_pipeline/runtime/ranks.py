"""Several processes of one stage that share a list of work: the first says what there is to do, and collects what was done.

They speak through files in a folder beside the stage's result, each put there by rename: torchrun's processes of one machine share its
disk, as they share the store. Nobody waits within a library call, so a stop is noticed at once by whoever waits.
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
    """The process among those of its stage, `rank` of `count`, as torchrun's environment says; without it the only one."""

    def __init__(self, result: Path, stop: StopSignal) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._stop = stop
        # One folder per launch, so that nothing an earlier one left is taken for this one's.
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        self._folder = result.with_name(f".{result.stem}.ranks-{launch}")
        self._old = f".{result.stem}.ranks-*"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that plans and collects."""
        return self.rank == 0

    def broadcast(self, plan: bytes) -> None:
        """Tell the other processes what there is to do. For the main process, once."""
        if self.count > 1:
            for left in self._folder.parent.glob(self._old):
                shutil.rmtree(left, ignore_errors=True)
            write_bytes_atomic(self._folder / _PLAN, plan)

    def receive(self) -> bytes:
        """What the main process says there is to do. Raises StageStopped when a stop comes first."""
        return self._wait_for(_PLAN)

    def gather(self, result: bytes) -> list[bytes] | None:
        """The results of all processes in the order of their ranks, for the main one; None for the others, which need not wait.

        Raises StageStopped when a stop comes first, as it does when another process fails.
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
