"""After which steps a run saves a checkpoint. No torch."""

from collections.abc import Callable
from typing import Literal

from sdxl_pipeline.config.schema.training import TrainingSettings

CheckpointKind = Literal["step", "rolling"]
"""One that stays until `checkpoints_total_limit`, or one that makes room for the next rolling one."""


def checkpoint_due(
    settings: TrainingSettings, step: int, total_steps: int, epochs_at: Callable[[int], float]
) -> CheckpointKind | None:
    """What to save after `step`, the number of steps taken; `epochs_at` gives the epochs that some steps make.

    An epoch that ends within a step has ended after it. The last step always leaves a checkpoint.
    """
    if step == total_steps or _divides(settings.checkpoint_step_interval, step):
        return "step"
    epochs = settings.checkpoint_epoch_interval
    if epochs is not None and epochs_at(step) // epochs > epochs_at(step - 1) // epochs:
        return "step"
    return "rolling" if _divides(settings.checkpointing_rolling_steps, step) else None


def checkpoint_limit(settings: TrainingSettings, kind: CheckpointKind) -> int | None:
    """How many checkpoints of a kind are kept; None: all."""
    return settings.checkpoints_rolling_total_limit if kind == "rolling" else settings.checkpoints_total_limit


def _divides(interval: int | None, step: int) -> bool:
    return bool(interval) and step % (interval or 1) == 0
