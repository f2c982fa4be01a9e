"""Over-fitting: the eval loss of held-out images rises while that of training images, the train probe, still falls.

Imports no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sdxl_pipeline.evaluation.report import paired_difference, rows_of_images
from sdxl_pipeline.evaluation.selection import lowest_loss
from sdxl_pipeline.runtime.evaluation_report import CheckpointLoss, LossSummary, Overfitting, ProbeGap
from sdxl_pipeline.training.logging.run_logs import EvalRow
from sdxl_pipeline.training.validation.eval_samples import EvalSource

MIN_HELD_OUT_IMAGES: Final = 4
"""With fewer the standard error itself is too uncertain for a conclusion."""

CONSECUTIVE: Final = 2
"""Measured steps in a row that have to show over-fitting, since one may be noise."""


@dataclass(frozen=True)
class LossPoint:
    """Eval losses after a step."""

    step: int
    held_out: LossSummary
    probe: LossSummary


def loss_points(
    checkpoints: Iterable[CheckpointLoss],
    rows: Iterable[EvalRow],
    base: LossSummary,
    base_probe: LossSummary | None,
) -> list[LossPoint]:
    """Return the losses of checkpoints, and those measured during the training on the base model's images, by step; those with a probe."""
    points = {
        row.step: LossPoint(row.step, row.loss, row.probe)
        for row in rows_of_images(rows, base, base_probe)
        if row.probe is not None
    }
    points |= {
        loss.step: LossPoint(loss.step, loss.held_out, loss.probe)
        for loss in checkpoints
        if loss.probe is not None
    }
    return [points[step] for step in sorted(points)]


def probe_gap(
    base_held_out: LossSummary,
    base_probe: LossSummary | None,
    held_out: LossSummary,
    probe: LossSummary | None,
) -> ProbeGap | None:
    """Return (held-out - probe) of a model minus the same of the base model; None without a probe.

    It equals the change of the held-out loss minus that of the probe. Both are paired by image and independent of each other, because
    they are of different images, so the squares of their standard errors add up.
    """
    if base_probe is None or probe is None:
        return None
    changes = (
        paired_difference(held_out, dict(base_held_out.by_image)),
        paired_difference(probe, dict(base_probe.by_image)),
    )
    errors = [change.standard_error for change in changes]
    return ProbeGap(
        mean=changes[0].mean - changes[1].mean,
        standard_error=None
        if None in errors
        else math.hypot(*(error for error in errors if error is not None)),
    )


def detect_overfitting(
    points: Sequence[LossPoint], gap: ProbeGap | None, source: EvalSource, images: int
) -> Overfitting:
    """Return from which step the training only improves on training images, with the gap of the last checkpoint.

    A step shows over-fitting if its held-out loss is higher than the lowest by more than one standard error of their paired difference,
    while its train probe is lower than at the step of the lowest. The first of two measured steps in a row that show it is reported.
    """
    if (reason := _why_inconclusive(points, source, images)) is not None:
        return Overfitting(
            conclusive=False, from_step=None, gap=gap, text=f"Over-fitting cannot be determined: {reason}."
        )
    best_step = lowest_loss({point.step: point.held_out for point in points})
    best = next(point for point in points if point.step == best_step)
    later = [point for point in points if point.step > best_step]
    shows = [_shows_overfitting(point, best) for point in later]
    first = next(
        (index for index in range(len(later) - CONSECUTIVE + 1) if all(shows[index : index + CONSECUTIVE])),
        None,
    )
    lowest = f"the lowest held-out eval loss is that of step {best_step} ({best.held_out.mean:.5f})"
    spread = f" Gap of the last checkpoint: {describe_gap(gap)}." if gap is not None else ""
    if first is not None:
        text = f"Over-fitting from step {later[first].step}: {lowest}, and later steps improve on training images only.{spread}"
        return Overfitting(conclusive=True, from_step=later[first].step, gap=gap, text=text)
    text = f"No over-fitting: {lowest}, and no {CONSECUTIVE} measured steps in a row after it improve on training images only."
    if shows and shows[-1]:
        text = f"No over-fitting is certain: {lowest}. Step {later[-1].step} improves on training images only, but a single step may be noise."
    elif not later:
        text = f"No over-fitting: {lowest}, the last one measured."
    return Overfitting(conclusive=True, from_step=None, gap=gap, text=text + spread)


def describe_gap(gap: ProbeGap) -> str:
    """Return the gap as text."""
    error = "" if gap.standard_error is None else f" ± {gap.standard_error:.2g} (standard error)"
    return f"{gap.mean:+.3g}{error}, held-out minus train probe, relative to the base model"


def _shows_overfitting(point: LossPoint, best: LossPoint) -> bool:
    difference = paired_difference(point.held_out, dict(best.held_out.by_image))
    error = difference.standard_error
    return error is not None and difference.mean > error and point.probe.mean < best.probe.mean


def _why_inconclusive(points: Sequence[LossPoint], source: EvalSource, images: int) -> str | None:
    fix = "add images, raise eval_holdout_share, or add an eval dataset"
    if source == "training images":
        return f"there are no held-out images; {fix}"
    if images < MIN_HELD_OUT_IMAGES:
        return f"{images} held-out images are fewer than {MIN_HELD_OUT_IMAGES}; {fix}"
    if not points:
        return "there is no train probe; set num_probe_images to 8 or more"
    if len(points) == 1:
        return "one measured step has no trend; set checkpoint_step_interval or eval_steps_interval, and keep more checkpoints"
    return None
