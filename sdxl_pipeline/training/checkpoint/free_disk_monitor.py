"""Monitoring of free disk space during training."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sdxl_pipeline.config.schema.checkpoints import CheckpointSettings
from sdxl_pipeline.files.disk_space import format_size
from sdxl_pipeline.runtime.stage_runner import StopSignal

CHECK_INTERVAL_SECONDS = 10.0
"""Interval between two queries of the free space, which may involve a file server."""

WAIT_INTERVAL_SECONDS = 5.0

CHECKPOINT_ADVICE = "Free some space, lower checkpoints_total_limit or change output_dir, then run this again: saved checkpoints are retained."


class FreeDiskMonitor:
    """Detects when the free space on the disk of a run's folder falls below `disk_low_threshold`."""

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self._folder, self._threshold = folder, settings.disk_low_threshold
        self._waits = settings.disk_low_action == "wait"
        self._next_check = 0.0

    def must_stop(self, stop: StopSignal, report: Callable[[str], None]) -> bool:
        """Return whether the disk is low and the run must end; with disk_low_action wait, block until there is space or `stop` is requested."""
        if self._threshold is None or time.monotonic() < self._next_check:
            return False
        if self._is_low() and not self._waits:
            return True
        if self._is_low():
            report(f"{self.describe_shortage()}. Waiting for more space (disk_low_action).")
        while self._is_low() and not stop.requested:
            time.sleep(WAIT_INTERVAL_SECONDS)
        self._next_check = time.monotonic() + CHECK_INTERVAL_SECONDS
        return False

    def describe_shortage(self) -> str:
        """Return the free space and the threshold as part of a message."""
        free = shutil.disk_usage(self._folder).free
        return f"the disk of {self._folder} has {format_size(free)} left, below disk_low_threshold ({format_size(self._threshold or 0)})"

    def _is_low(self) -> bool:
        return self._threshold is not None and shutil.disk_usage(self._folder).free < self._threshold
