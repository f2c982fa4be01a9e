"""eval_loss.jsonl: the eval losses taken during a training. No torch."""

import json
import os
from pathlib import Path

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import LossSummary, StageModel
from sdxl_pipeline.training.logging.metrics_log import complete_lines

EVAL_FILE = "eval_loss.jsonl"


class EvalRow(StageModel):
    """The eval loss after a step."""

    step: int  # 0 for the base model
    loss: LossSummary


class EvalLog:
    """The eval losses so far. Opening it at the step a run resumes from drops the lines past it, which will be written again."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        self._path = run_dir / EVAL_FILE
        self.rows = [row for row in read_eval_log(run_dir) if row.step <= resumed_at]
        if self.rows or self._path.exists():
            write_text_atomic(self._path, "".join(row.model_dump_json() + "\n" for row in self.rows))

    def has(self, step: int) -> bool:
        """Whether the loss after a step has been taken."""
        return any(row.step == step for row in self.rows)

    def add(self, row: EvalRow) -> None:
        """Record a loss."""
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(row.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_eval_log(run_dir: Path) -> list[EvalRow]:
    """The losses recorded in a run's folder, without a last line that a kill cut short."""
    path = run_dir / EVAL_FILE
    if not path.exists():
        return []
    return [EvalRow.model_validate(json.loads(line)) for line in complete_lines(path)]
