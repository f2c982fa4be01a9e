"""Steps that come to NaN or infinity: skipped where the gradients lie, named and counted when they are reported."""

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.bucket_sampler import SampleRef

NON_FINITE_LIMIT = 10
"""Skipped steps in a row that end a run."""

NAMED_IMAGES = 16
"""Images named of a skipped step."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss, to the bit; one that is not finite gets gradients that are not finite either.

    Without it an infinite Huber loss would have finite ones. Since data parallelism averages gradients, every process then comes to the
    same decision about a step from its gradients alone.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def step_if_finite(optimizer: AcceleratedOptimizer, grad_norm: Tensor) -> None:
    """Take an optimizer step unless the gradients' norm is not finite: then parameters and state stay what they are, to the bit.

    Loss scaling skips such steps by itself. Torch's fused optimizers take the decision on the device, by the mechanism that
    `torch.amp.GradScaler` uses. Any other has state that only the host can leave alone, so the host waits for the norm: once a step, as
    GradScaler does for them.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is not None:
        optimizer.step()
    elif getattr(inner, "_step_supports_amp_scaling", False):
        inner.grad_scale, inner.found_inf = None, (~torch.isfinite(grad_norm)).float()
        try:
            optimizer.step()
        finally:
            del inner.grad_scale, inner.found_inf
    elif bool(torch.isfinite(grad_norm)):
        optimizer.step()


class SkippedSteps:
    """Counts the skipped steps of a session, and ends the run when too many come in a row."""

    def __init__(self, total_steps: int) -> None:
        self._limit = min(NON_FINITE_LIMIT, total_steps)
        self._row: list[int] = []

    def taken(self) -> None:
        """A step was taken."""
        self._row.clear()

    def skipped(self, number: int, loss: float, batches: Iterable[Sequence[SampleRef]]) -> str:
        """The warning for step `number`, whose loss or gradients came of `batches`. Raises UserError at the limit."""
        self._row.append(number)
        what = f"its loss is {loss}" if not math.isfinite(loss) else "its gradients are not finite"
        images = list(dict.fromkeys(_name(draw) for batch in batches for draw in batch))
        more = f" and {len(images) - NAMED_IMAGES} more" if len(images) > NAMED_IMAGES else ""
        named = ", ".join(images[:NAMED_IMAGES]) + more
        if len(self._row) < self._limit:
            return f"Warning: step {number} is skipped, since {what}. Its images: {named}."
        raise UserError(
            f"steps {self._row[0]} to {number} were skipped one after the other, the last since {what} with the images {named}. "
            "If the same images return, look at them and their latents; else lower learning_rate, lengthen lr_warmup_steps, or set "
            "mixed_precision to bf16 or no. The weights are those from before these steps, and so are the checkpoints'"
        )


def _name(draw: SampleRef) -> str:
    return f"{draw.sample.dataset_id}/{draw.sample.path} (key {draw.sample.key[:12]})"
