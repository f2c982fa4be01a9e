"""metrics.jsonl: one JSON object per optimizer step, in order, however often the run was interrupted."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import write_text_atomic

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step."""

    step: int  # 1 for the first
    loss: float  # mean over accumulation and processes
    lr: float  # that the step was taken with
    grad_norm: float | None  # before clipping; None where fp16 overflowed and the step was skipped
    samples_per_second: float  # over the steps since the last report
    steps_per_second: float | None = None  # likewise
    eta_seconds: float | None = None  # to the end of the run, at that speed and with the looks to come
    scalars: Mapping[str, float] = field(default_factory=dict)  # whatever else changes from step to step

    @property
    def figures(self) -> dict[str, float]:
        """What is known of the step, by name."""
        known = {name: getattr(self, name) for name in _FIGURES}
        return {name: value for name, value in known.items() if value is not None} | dict(self.scalars)


_FIGURES = tuple(item.name for item in fields(StepMetrics) if item.name not in ("step", "scalars"))


class MetricsLog:
    """Appends to metrics.jsonl. Opening it at the step a run resumes from drops the lines past it, which will be written again."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row.step <= resumed_at]
        write_text_atomic(path, "".join(_line(row) for row in kept))

    def append(self, rows: Iterable[StepMetrics]) -> None:
        """Write rows through to the disk, so that a checkpoint made afterwards never knows more steps than the log."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[StepMetrics]:
    """The rows of a log, without a last line that a kill cut short. Empty when there is no log yet."""
    if not path.exists():
        return []
    return [StepMetrics(**json.loads(line)) for line in complete_lines(path)]


def complete_lines(path: Path) -> list[str]:
    """The lines of a text file that end in a newline."""
    return [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def final_loss(rows: Sequence[StepMetrics]) -> float:
    """Mean loss over the last tenth of the steps, at least one."""
    last = rows[-max(1, len(rows) // 10) :]
    return sum(row.loss for row in last) / len(last)


def _line(row: StepMetrics) -> str:
    values: dict[str, Any] = asdict(row)
    return json.dumps(values, allow_nan=False) + "\n"
