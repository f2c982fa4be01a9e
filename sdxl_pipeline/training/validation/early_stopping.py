"""Early stopping: when the eval loss during training no longer falls. Does not import torch.

The decision is a function of the rows of eval_loss.jsonl alone, which are on disk before the next checkpoint. A run that is killed and
resumed therefore stops at the same step as an uninterrupted one.

The rule counts evaluations in a row without an improvement of `min_delta` (Prechelt 1998, "Early Stopping - But When?", the criterion UP
in its form with patience, as in Keras and Lightning).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdxl_pipeline.config.schema.evaluation import EvaluationSettings
from sdxl_pipeline.runtime.specs import EarlyStop
from sdxl_pipeline.training.checkpoint.run_identity import read_lineage
from sdxl_pipeline.training.logging.run_logs import EVAL_LOSS_FILE, EvalRow, read_eval_losses


class Decision(NamedTuple):
    """What follows from the eval losses of a run up to a step."""

    best_step: int | None
    """Step of the best eval loss: its checkpoint is retained. None before the first finite loss."""
    stop: EarlyStop | None
    """Set if the run ends at this step."""


def decide(rows: Sequence[EvalRow], patience: int, min_delta: float, step: int) -> Decision:
    """Return the best step of `rows`, which are in the order of their steps, and whether the run ends at `step`.

    An eval loss is better if it is below the best one by more than `min_delta`; one that is not finite never is. The run ends after
    `patience` evaluations in a row that are not better, and only at the step of the last row, never for lack of a finite loss.
    """
    best: EvalRow | None = None
    evaluations_since_best = 0
    for row in rows:
        if math.isfinite(row.loss.mean) and (best is None or row.loss.mean < best.loss.mean - min_delta):
            best, evaluations_since_best = row, 0
        else:
            evaluations_since_best += 1
    if best is None:
        return Decision(None, None)
    stops = evaluations_since_best >= patience and rows[-1].step == step
    stop = EarlyStop(step=step, best_step=best.step, best_loss=best.loss.mean, patience=patience)
    return Decision(best.step, stop if stops else None)


def decide_for_run(
    run_dir: Path, settings: EvaluationSettings, step: int, is_due: Callable[[int], bool]
) -> Decision:
    """Return the decision at a step of the run in a folder from its eval_loss.jsonl; none without `early_stopping_patience`.

    Eval losses are counted at the steps for which `is_due` is true, since an imported log also has the last step of a shorter run, and
    after the warm start of a run that began from the weights of another training.
    """
    if settings.early_stopping_patience is None:
        return Decision(None, None)
    lineage = read_lineage(run_dir)
    ancestor = lineage and lineage.ancestor
    begins_at = ancestor.step if ancestor and not ancestor.same_trajectory else 0  # 0 is the base model
    rows = [
        row
        for row in read_eval_losses(run_dir / EVAL_LOSS_FILE)
        if begins_at < row.step <= step and is_due(row.step)
    ]
    return decide(rows, settings.early_stopping_patience, settings.early_stopping_min_delta, step)
