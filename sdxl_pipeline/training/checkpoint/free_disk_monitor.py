"""The disk of a run, watched while training."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.disk_space import size_text
from sdxl_pipeline.runtime.stage_runner import StopSignal

CHECK_INTERVAL_SECONDS = 10.0
"""Between two looks at the free space, which may ask a file server."""

WAIT_INTERVAL_SECONDS = 5.0

CHECKPOINT_ADVICE = "Free some, or lower checkpoints_total_limit, or change output_dir, and run this again: what was saved before is kept."


class FreeDiskMonitor:
    """Watches the disk of a run's folder for falling below `disk_low_threshold`."""

    def __init__(self, folder: Path, settings: TrainingSettings) -> None:
        self._folder, self._threshold = folder, settings.disk_low_threshold
        self._waits = settings.disk_low_action == "wait"
        self._next_validation = 0.0

    def must_stop(self, stop: StopSignal, report: Callable[[str], None]) -> bool:
        """Whether the disk is low and the run is to end; where it is to wait, this does so until there is space or `stop` is asked for."""
        if self._threshold is None or time.monotonic() < self._next_validation:
            return False
        if self._is_low() and not self._waits:
            return True
        if self._is_low():
            report(f"{self.what_is_wrong()}. Waiting until there is more (disk_low_action).")
        while self._is_low() and not stop.requested:
            time.sleep(WAIT_INTERVAL_SECONDS)
        self._next_validation = time.monotonic() + CHECK_INTERVAL_SECONDS
        return False

    def what_is_wrong(self) -> str:
        """In words."""
        free = shutil.disk_usage(self._folder).free
        return f"the disk of {self._folder} has {size_text(free)} left, below disk_low_threshold ({size_text(self._threshold or 0)})"

    def _is_low(self) -> bool:
        return self._threshold is not None and shutil.disk_usage(self._folder).free < self._threshold
