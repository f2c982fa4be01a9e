"""Reporting from a stage: log lines, progress, metrics and images.

A stage calls one `Reporter` and does not know its sink: Pipes messages when launched by Dagster, progress bars on a terminal, plain lines
in a file. Calls are cheap and throttled here, so a stage may report on every step.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dagster_pipes import PipesContext, PipesEnvVarParamsLoader, open_dagster_pipes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PROGRESS_INTERVAL_SECONDS = 1.0
METRIC_INTERVAL_SECONDS = 0.5

# Minimum interval as a share of the elapsed time, so that the number of messages grows with the logarithm of a run's length: some
# thousands per day, while a run of one minute shows every second.
INTERVAL_SHARE_OF_ELAPSED = 1 / 500

# Dagster's event log is a database: further lines of a stage go only to stdout, which Dagster stores as a file.
MAX_EVENT_LOG_LINES = 1000


@dataclass
class _Throttle:
    """Rate limiter for calls of one kind: allows the first call and then one per interval."""

    interval: float
    clock: Callable[[], float]
    started: float | None = None
    last: float = 0.0

    def allows(self) -> bool:
        now = self.clock()
        if self.started is None:
            self.started = self.last = now
            return True
        if now - self.last < max(self.interval, (now - self.started) * INTERVAL_SHARE_OF_ELAPSED):
            return False
        self.last = now
        return True


class Reporter:
    """Throttles a stage's reports. This base class shows nothing: it is the reporter of all ranks but rank 0.

    Subclasses override the `_show_*` hooks, which get the reports that are not throttled. Use it as a context manager, or call `close`,
    so that the last throttled metrics are shown.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress_throttles: dict[str, _Throttle] = {}
        self._shown_progress: dict[str, tuple[int, int]] = {}
        self._metric_throttles: dict[frozenset[str], _Throttle] = {}
        self._pending_metrics: dict[frozenset[str], tuple[int, dict[str, float]]] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, message: str) -> None:
        """Report one line. Not throttled."""
        self._show_log(message)

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        """Report that `done` of `total` units of a task are done. The first and the last call of a task are never throttled."""
        if self._shown_progress.get(task) == (done, total):
            return
        throttle = self._progress_throttles.setdefault(
            task, _Throttle(PROGRESS_INTERVAL_SECONDS, self._clock)
        )
        if throttle.allows() or done >= total:
            self._shown_progress[task] = (done, total)
            self._show_progress(task, done, total, unit)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Report metrics of a step. Throttled per set of names; the last call of each set is shown at `close` at the latest.

        For display only: the stage writes the complete curve itself (metrics.jsonl).
        """
        names = frozenset(values)
        floats = {name: float(value) for name, value in values.items()}
        throttle = self._metric_throttles.setdefault(names, _Throttle(METRIC_INTERVAL_SECONDS, self._clock))
        if throttle.allows():
            self._pending_metrics.pop(names, None)
            self._show_metric(step, floats)
        else:
            self._pending_metrics[names] = (step, floats)

    def image(self, name: str, path: Path | str, caption: str = "", step: int | None = None) -> None:
        """Report an image file."""
        self._show_image(name, str(Path(path).resolve()), caption, step)

    def close(self) -> None:
        """Show the last throttled metrics."""
        for step, floats in self._pending_metrics.values():
            self._show_metric(step, floats)
        self._pending_metrics.clear()

    def _show_log(self, message: str) -> None:
        pass

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        pass

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        pass

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        pass


class PlainReporter(Reporter):
    """Writes one line of text per report, flushed at once: for files and pipes."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._stream = stream or sys.stdout

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _show_log(self, message: str) -> None:
        self._write(message)

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        self._write(progress_line(task, done, total, unit))

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        self._write(metric_line(step, values))

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        self._write(image_line(name, path, caption, step))


class PipesReporter(PlainReporter):
    """Sends every report to Dagster as a custom Pipes message, and writes it as a line to stdout, the step's compute log.

    The messages are dicts with a `type`: "progress" (task, done, total, unit), "metric" (step, values; a non-finite number is sent as a
    string, since JSON has none), "image" (name, path, caption, step). Log lines are Pipes' own log messages.
    """

    def __init__(
        self,
        pipes: PipesContext,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream, clock)
        self._pipes = pipes
        self._log_lines = 0

    def _show_log(self, message: str) -> None:
        super()._show_log(message)
        self._log_lines += 1
        if self._log_lines < MAX_EVENT_LOG_LINES:
            self._pipes.log.info(message)
        elif self._log_lines == MAX_EVENT_LOG_LINES:
            self._pipes.log.info("Too many log lines: further lines go to this step's stdout only.")

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        super()._show_progress(task, done, total, unit)
        self._pipes.report_custom_message(
            {"type": "progress", "task": task, "done": done, "total": total, "unit": unit}
        )

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        super()._show_metric(step, values)
        json_values = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._pipes.report_custom_message({"type": "metric", "step": step, "values": json_values})

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        super()._show_image(name, path, caption, step)
        self._pipes.report_custom_message(
            {"type": "image", "name": name, "path": path, "caption": caption, "step": step}
        )


class TerminalReporter(Reporter):
    """Shows progress bars, one per task, and metrics as log lines."""

    def __init__(self, progress: "Progress", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._bars = progress
        self._tasks: dict[str, TaskID] = {}

    def _print(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_log(self, message: str) -> None:
        self._print(message)

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, unit=unit)
        self._bars.update(self._tasks[task], completed=done, total=total, unit=unit)

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        self._print(metric_line(step, values))

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        self._print(image_line(name, path, caption, step))


def progress_line(task: str, done: int, total: int, unit: str = "") -> str:
    """Format progress, for example "encode latents: 12 of 48 images (25 %)"."""
    share = f" ({100 * done // total} %)" if total > 0 else ""
    return f"{task}: {done} of {total}{' ' + unit if unit else ''}{share}"


def metric_line(step: int, values: Mapping[str, float]) -> str:
    """Format metrics as one line, for example "step 12: loss 0.1234, lr 0.0001"."""
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def image_line(name: str, path: str, caption: str = "", step: int | None = None) -> str:
    """Format an image as one line, for example "image red_star at step 20: /runs/a/20.png (a red star)"."""
    at_step = "" if step is None else f" at step {step}"
    return f"image {name}{at_step}: {path}{f' ({caption})' if caption else ''}"


def is_main_process() -> bool:
    """Return whether this process reports and writes for its group: true without torchrun and for rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """Yield the reporter of this process: Pipes under Dagster, bars on a terminal, plain lines otherwise; silent on ranks above 0."""
    if not is_main_process():
        yield Reporter()
    elif PipesEnvVarParamsLoader().is_dagster_pipes_process():
        with open_dagster_pipes() as pipes, PipesReporter(pipes) as reporter:
            yield reporter
    elif sys.stdout.isatty():
        with _bars() as bars, TerminalReporter(bars) as reporter:
            yield reporter
    else:
        with PlainReporter() as reporter:
            yield reporter


def _bars() -> "Progress":
    """Return rich's progress bars; rich is imported only here."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
