"""The schedule of checkpoints: after which steps a run saves one. Imports no torch."""

from collections.abc import Callable
from typing import Literal

from sdxl_pipeline.config.schema.checkpoints import CheckpointSettings

CheckpointKind = Literal["step", "rolling", "best"]
"""A "step" checkpoint is subject to `checkpoints_total_limit`, a "rolling" one to `checkpoints_rolling_total_limit`. "best" is one of the
best eval loss at a step without another checkpoint: the next best one replaces it."""


def checkpoint_due(
    settings: CheckpointSettings, step: int, total_steps: int, epochs_at: Callable[[int], float]
) -> CheckpointKind | None:
    """Return the kind of checkpoint due after `step` optimizer steps; `epochs_at` gives the number of epochs after some steps.

    An epoch that ends within a step ends after it. The last step always saves a checkpoint.
    """
    if step == total_steps or _divides(settings.checkpoint_step_interval, step):
        return "step"
    epochs = settings.checkpoint_epoch_interval
    if epochs is not None and epochs_at(step) // epochs > epochs_at(step - 1) // epochs:
        return "step"
    return "rolling" if _divides(settings.checkpointing_rolling_steps, step) else None


def checkpoint_limit(settings: CheckpointSettings, kind: CheckpointKind) -> int | None:
    """Return how many checkpoints of a kind are retained beside the best one; None: all."""
    return settings.checkpoints_rolling_total_limit if kind == "rolling" else settings.checkpoints_total_limit


def _divides(interval: int | None, step: int) -> bool:
    return bool(interval) and step % (interval or 1) == 0
