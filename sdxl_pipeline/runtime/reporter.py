"""How a stage tells the outside what it is doing: log lines, progress, metrics and images.

A stage calls one `Reporter` and knows nothing of who listens. Launched by Dagster it speaks the Pipes protocol; on a terminal it draws
progress bars; into a file it writes plain lines. Calls are cheap and throttled here, so a stage may report on every step.
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

# Messages of one kind come no closer than this share of the time passed, so that their number grows with the logarithm of a run's
# length: some thousands in a day, while a run of a minute shows every second.
INTERVAL_SHARE_OF_ELAPSED = 1 / 500

# Dagster's event log is a database: beyond this many lines of one stage only stdout, which Dagster keeps as a file, gets them.
MAX_EVENT_LOG_LINES = 1000


@dataclass
class _Throttle:
    """Decides which calls of one kind pass: the first, and then one per interval."""

    interval: float
    clock: Callable[[], float]
    started: float | None = None
    last: float = 0.0

    def passes(self) -> bool:
        now = self.clock()
        if self.started is None:
            self.started = self.last = now
            return True
        if now - self.last < max(self.interval, (now - self.started) * INTERVAL_SHARE_OF_ELAPSED):
            return False
        self.last = now
        return True


class Reporter:
    """Takes what a stage says and throttles it. This base class shows nothing: it is the reporter of all ranks but the first.

    Subclasses override the `_show_*` hooks, which get what passed. Use it as a context manager, or call `close`, so that the last
    metrics, which the throttle may have held back, are shown.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress_throttles: dict[str, _Throttle] = {}
        self._shown_progress: dict[str, tuple[int, int]] = {}
        self._metric_throttles: dict[frozenset[str], _Throttle] = {}
        self._held_metrics: dict[frozenset[str], tuple[int, dict[str, float]]] = {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, message: str) -> None:
        """Say one line. Not throttled."""
        self._show_log(message)

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        """Say that `done` of `total` units of a task are done. The first and the last call of a task always pass."""
        if self._shown_progress.get(task) == (done, total):
            return
        throttle = self._progress_throttles.setdefault(
            task, _Throttle(PROGRESS_INTERVAL_SECONDS, self._clock)
        )
        if throttle.passes() or done >= total:
            self._shown_progress[task] = (done, total)
            self._show_progress(task, done, total, unit)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Report figures at a step. Throttled per set of names; the last call of each set always passes, at `close` at latest.

        These are for watching. The complete curve is the stage's own to write (metrics.jsonl).
        """
        names = frozenset(values)
        figures = {name: float(value) for name, value in values.items()}
        throttle = self._metric_throttles.setdefault(names, _Throttle(METRIC_INTERVAL_SECONDS, self._clock))
        if throttle.passes():
            self._held_metrics.pop(names, None)
            self._show_metric(step, figures)
        else:
            self._held_metrics[names] = (step, figures)

    def image(self, name: str, path: Path | str, caption: str = "", step: int | None = None) -> None:
        """Point at an image that was written to `path`."""
        self._show_image(name, str(Path(path).resolve()), caption, step)

    def close(self) -> None:
        """Show what the throttle still holds."""
        for step, figures in self._held_metrics.values():
            self._show_metric(step, figures)
        self._held_metrics.clear()

    def _show_log(self, message: str) -> None:
        pass

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        pass

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        pass

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        pass


class PlainReporter(Reporter):
    """One line of text per event, flushed at once: for files and pipes."""

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
    """Sends every event to Dagster as a custom Pipes message, and writes it as a line to stdout, the step's compute log.

    The messages are dicts with a `type`: "progress" (task, done, total, unit), "metric" (step, values; a non-finite number is sent as
    its name in a string, since JSON has none), "image" (name, path, caption, step). Log lines are Pipes' own log messages.
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
            self._pipes.log.info("Many log lines: from here on they are in this step's stdout only.")

    def _show_progress(self, task: str, done: int, total: int, unit: str) -> None:
        super()._show_progress(task, done, total, unit)
        self._pipes.report_custom_message(
            {"type": "progress", "task": task, "done": done, "total": total, "unit": unit}
        )

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        super()._show_metric(step, values)
        sendable = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._pipes.report_custom_message({"type": "metric", "step": step, "values": sendable})

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        super()._show_image(name, path, caption, step)
        self._pipes.report_custom_message(
            {"type": "image", "name": name, "path": path, "caption": caption, "step": step}
        )


class TerminalReporter(Reporter):
    """Progress bars, one per task, with the latest metrics beneath the log lines."""

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
    """Progress as people read it, for example "encode latents: 12 of 48 images (25 %)"."""
    share = f" ({100 * done // total} %)" if total > 0 else ""
    return f"{task}: {done} of {total}{' ' + unit if unit else ''}{share}"


def metric_line(step: int, values: Mapping[str, float]) -> str:
    """Metrics on one line, for example "step 12: loss 0.1234, lr 0.0001"."""
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def image_line(name: str, path: str, caption: str = "", step: int | None = None) -> str:
    """An image on one line, for example "image red_star at step 20: /runs/a/20.png (a red star)"."""
    at_step = "" if step is None else f" at step {step}"
    return f"image {name}{at_step}: {path}{f' ({caption})' if caption else ''}"


def is_main_process() -> bool:
    """Whether this process speaks and writes for its group: true for a single process and for torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """The reporter for this process: Pipes under Dagster, bars on a terminal, plain lines otherwise; silent on ranks above 0."""
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
    """Rich is imported only by whoever sits at a terminal."""
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
