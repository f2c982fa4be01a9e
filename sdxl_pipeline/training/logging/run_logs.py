"""The JSON-lines logs of a run: metrics.jsonl, eval_loss.jsonl and validation.jsonl. Does not import torch."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.specs import StageModel, ValidationImage

METRICS_FILE = "metrics.jsonl"
EVAL_LOSS_FILE = "eval_loss.jsonl"
VALIDATION_FILE = "validation.jsonl"


class HasStep(Protocol):
    """A row of a log."""

    @property
    def step(self) -> int:
        """Return the optimizer step after which the row was recorded; 0 is the base model."""
        ...


Row = TypeVar("Row", bound=HasStep)


class RunLog(Generic[Row]):
    """An append-only log: one JSON object per line, in the order of the steps.

    Opening it at the step that a run resumes from drops the rows after that step, because the run writes them again.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], list[Row]], to_json: Callable[[Row], str], resumed_at: int
    ) -> None:
        self._path, self._to_json = path, to_json
        rows = [row for row in read(path) if row.step <= resumed_at]
        self._steps = {row.step for row in rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_text_atomic(path, "".join(map(self._line, rows)))

    def has(self, step: int) -> bool:
        """Return whether the log has a row of a step."""
        return step in self._steps

    def append(self, rows: Iterable[Row]) -> None:
        """Append rows and sync them to disk, so that a checkpoint saved afterwards is never ahead of the log."""
        rows = list(rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(map(self._line, rows))
            file.flush()
            os.fsync(file.fileno())
        self._steps.update(row.step for row in rows)

    def _line(self, row: Row) -> str:
        return self._to_json(row) + "\n"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one optimizer step: a row of metrics.jsonl."""

    step: int  # 1 for the first
    loss: float  # mean over accumulation and processes
    lr: float  # of this step
    grad_norm: float | None  # before clipping; None where fp16 overflowed and the step was skipped
    samples_per_second: float  # over the steps since the last report
    steps_per_second: float | None = None  # likewise
    eta_seconds: float | None = (
        None  # to the end of the run, at that speed and with the remaining validations
    )
    scalars: Mapping[str, float] = field(
        default_factory=dict
    )  # everything else that changes from step to step

    @property
    def metrics(self) -> dict[str, float]:
        """Return all known metrics of the step by name, `scalars` included."""
        known = {name: getattr(self, name) for name in _METRICS}
        return {name: value for name, value in known.items() if value is not None} | dict(self.scalars)


_METRICS = tuple(item.name for item in fields(StepMetrics) if item.name not in ("step", "scalars"))


class EvalRow(StageModel):
    """The eval loss after a step: a row of eval_loss.jsonl."""

    step: int  # 0 for the base model
    loss: LossSummary
    probe: LossSummary | None = None  # of training images
    weights: Literal["trained", "ema"] = "trained"


def metrics_log(run_dir: Path, resumed_at: int) -> RunLog[StepMetrics]:
    """Open metrics.jsonl: one row per optimizer step, however often the run was interrupted."""
    return RunLog(run_dir / METRICS_FILE, read_metrics, _metrics_json, resumed_at)


def eval_loss_log(run_dir: Path, resumed_at: int) -> RunLog[EvalRow]:
    """Open eval_loss.jsonl: the eval losses measured during training."""
    return RunLog(run_dir / EVAL_LOSS_FILE, read_eval_losses, EvalRow.model_dump_json, resumed_at)


def validation_log(run_dir: Path, resumed_at: int) -> RunLog[ValidationImage]:
    """Open validation.jsonl: one row per validation image; the rows of a step are appended together once all are generated."""
    to_json = partial(_image_json, run_dir=run_dir)
    return RunLog(run_dir / VALIDATION_FILE, read_validation_images, to_json, resumed_at)


def read_metrics(path: Path) -> list[StepMetrics]:
    """Return the rows of a metrics.jsonl; empty when there is no such file."""
    return [StepMetrics(**json.loads(line)) for line in _complete_lines(path)]


def read_eval_losses(path: Path) -> list[EvalRow]:
    """Return the rows of an eval_loss.jsonl; empty when there is no such file."""
    return [EvalRow.model_validate(json.loads(line)) for line in _complete_lines(path)]


def read_validation_images(path: Path) -> list[ValidationImage]:
    """Return the rows of a validation.jsonl whose image files exist, with absolute paths; empty when there is no such file."""
    rows = (json.loads(line) for line in _complete_lines(path))
    images = [ValidationImage(**{**row, "path": str(path.parent / row["path"])}) for row in rows]
    return [image for image in images if Path(image.path).exists()]


def final_loss(rows: Sequence[StepMetrics]) -> float:
    """Return the mean loss over the last tenth of the rows, at least one."""
    last = rows[-max(1, len(rows) // 10) :]
    return sum(row.loss for row in last) / len(last)


def _metrics_json(row: StepMetrics) -> str:
    return json.dumps(asdict(row), allow_nan=False)


def _image_json(image: ValidationImage, run_dir: Path) -> str:
    # relative, because the run's folder may be moved
    return image.model_copy(update={"path": os.path.relpath(image.path, run_dir)}).model_dump_json()


def _complete_lines(path: Path) -> list[str]:
    """Return the lines that end in a newline: a killed process may leave an incomplete last line."""
    if not path.exists():
        return []
    return [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
