"""A stage's Pipes messages as Dagster events: progress as log lines, images and metrics as asset observations."""

import base64
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import dagster as dg
from PIL import Image

from sdxl_pipeline.data.quality.contact_sheets import to_jpeg
from sdxl_pipeline.runtime.reporter import image_line, progress_line

IMAGE_BYTES: Final = 32_000
"""Largest JPEG of one image in the event log."""

IMAGE_SECONDS: Final = 5.0
IMAGE_SHARE_OF_ELAPSED: Final = 1 / 200
"""Smallest interval between images of one name: the larger of IMAGE_SECONDS and this share of the elapsed time."""


class PointThinner:
    """Selects about `limit` points of a curve whose points arrive one by one.

    With a known total number of steps, it selects one point per `total / limit` steps. Without it, the distance to the next point is a
    tenth of the step, so that the number of points grows with the logarithm of the steps.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last: int | None = None

    def select(self, step: int, total: int | None) -> bool:
        """Return whether the point at `step` is selected: the first always, a point at the step of the last one never."""
        if self._last is not None:
            gap = math.ceil(total / self._limit) if total else max(1, self._last // 10)
            if step < self._last + gap:
                return False
        self._last = step
        return True

    def is_last_selected(self, step: int) -> bool:
        """Return whether `step` is the last one selected."""
        return self._last == step


class MessageRelay:
    """Writes a stage's Pipes messages (see PipesReporter) to the step's event log, thinned because that log is a database."""

    def __init__(
        self,
        context: dg.OpExecutionContext | dg.AssetExecutionContext,
        progress_seconds: float,
        metric_points: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._progress_seconds = progress_seconds
        self._metric_points = metric_points
        self._clock = clock
        self._relayed = 0
        self._logged_at: dict[str, float] = {}
        self._totals: dict[str, int] = {}
        self._thinners: dict[frozenset[str], PointThinner] = {}
        self._newest: dict[frozenset[str], dict[str, Any]] = {}
        self._images: dict[str, tuple[float, float]] = {}  # name -> time of the first and the last image

    def relay(self, messages: Sequence[Any]) -> None:
        """Handle the messages received since the last call. `messages` is the complete list of the session, as Dagster returns it."""
        for message in messages[self._relayed :]:
            self._handle(message)
        self._relayed = len(messages)

    def finish(self) -> None:
        """Write the last point of each curve if it was not selected."""
        for names, message in self._newest.items():
            if not self._thinners[names].is_last_selected(message["step"]):
                self._observe(message)
        self._newest.clear()

    def _handle(self, message: dict[str, Any]) -> None:
        match message:
            case {"type": "progress", "task": task, "done": done, "total": total, "unit": unit}:
                self._totals[task] = total
                self._log_progress(task, done, total, unit)
            case {"type": "metric", "step": step, "values": values}:
                names = frozenset(values)
                thinner = self._thinners.setdefault(names, PointThinner(self._metric_points))
                self._newest[names] = message
                if thinner.select(step, self._total_steps(step)):
                    self._observe(message)
            case {"type": "image", "name": name, "path": path, "caption": caption, "step": step}:
                if self._image_is_due(name):
                    self._context.log.info(image_line(name, path, caption, step))
                    self._observe_image(name, Path(path), caption, step)
            case _:
                raise ValueError(f"unknown message from a stage: {message!r}")

    def _log_progress(self, task: str, done: int, total: int, unit: str) -> None:
        now = self._clock()
        due = task not in self._logged_at or now - self._logged_at[task] >= self._progress_seconds
        if due or done >= total:
            self._logged_at[task] = now
            self._context.log.info(progress_line(task, done, total, unit))

    def _image_is_due(self, name: str) -> bool:
        now = self._clock()
        first, last = self._images.setdefault(name, (now, -math.inf))
        if now - last < max(IMAGE_SECONDS, (now - first) * IMAGE_SHARE_OF_ELAPSED):
            return False
        self._images[name] = first, now
        return True

    def _observe_image(self, name: str, path: Path, caption: str, step: int | None) -> None:
        """Write the image to the event log. A missing file is a preview that was deleted in the meantime."""
        try:
            with Image.open(path) as opened:
                content = to_jpeg(opened.convert("RGB"), max_bytes=IMAGE_BYTES)
        except FileNotFoundError:
            return
        encoded = base64.b64encode(content).decode("ascii")
        metadata: dict[str, Any] = {
            "image": dg.MetadataValue.md(f"![{name}](data:image/jpeg;base64,{encoded})"),
            "name": name,
            "caption": caption,
        }
        if step is not None:
            metadata["step"] = dg.MetadataValue.int(step)
        self._context.log_event(dg.AssetObservation(self._context.asset_key, metadata=metadata))

    def _total_steps(self, step: int) -> int | None:
        """Return the total of the longest task with at least `step` steps. Only training reports metrics per step, and it is the longest task."""
        return max((total for total in self._totals.values() if total >= step), default=None)

    def _observe(self, message: dict[str, Any]) -> None:
        metadata: dict[str, Any] = {"step": message["step"], **message["values"]}
        self._context.log_event(dg.AssetObservation(self._context.asset_key, metadata=metadata))
