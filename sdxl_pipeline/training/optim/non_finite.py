"""Steps with a NaN or infinite loss or gradients: skipped on the device, counted and reported with their images."""

import math
from collections.abc import Iterable, Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.bucket_sampler import SampleRef

NON_FINITE_LIMIT = 10
"""Consecutive skipped steps that end a run."""

MAX_LISTED_IMAGES = 16
"""Images listed for a skipped step; the rest are counted."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss unchanged if it is finite, and multiply a non-finite one by NaN so that its gradients are non-finite.

    Otherwise an infinite Huber loss would have finite gradients. Since data parallelism averages gradients, every process then decides
    about a step in the same way, from its gradients alone.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def step_if_finite(optimizer: AcceleratedOptimizer, grad_norm: Tensor) -> None:
    """Take an optimizer step if the gradients' norm is finite; otherwise leave parameters and state unchanged, bit for bit.

    Loss scaling skips such steps by itself. Torch's fused optimizers decide on the device, by the mechanism that `torch.amp.GradScaler`
    uses. For all others the host has to wait for the norm once per step, as GradScaler does for them.
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
    """Counts the skipped steps of a session, and ends the run after too many consecutive ones."""

    def __init__(self, total_steps: int) -> None:
        self._limit = min(NON_FINITE_LIMIT, total_steps)
        self._consecutive: list[int] = []

    def applied(self) -> None:
        """Reset the count: a step was taken."""
        self._consecutive.clear()

    def skipped(self, number: int, loss: float, batches: Iterable[Sequence[SampleRef]]) -> str:
        """Return a warning for step `number`, computed from `batches`. Raise UserError at the limit."""
        self._consecutive.append(number)
        cause = f"its loss is {loss}" if not math.isfinite(loss) else "its gradients are not finite"
        images = list(dict.fromkeys(_describe(ref) for batch in batches for ref in batch))
        more = f" and {len(images) - MAX_LISTED_IMAGES} more" if len(images) > MAX_LISTED_IMAGES else ""
        listed = ", ".join(images[:MAX_LISTED_IMAGES]) + more
        if len(self._consecutive) < self._limit:
            return f"Warning: step {number} is skipped because {cause}. Its images: {listed}."
        raise UserError(
            f"steps {self._consecutive[0]} to {number} were skipped one after the other, the last because {cause}, with the images {listed}. "
            "If the same images recur, check them and their latents; otherwise lower learning_rate, lengthen lr_warmup_steps, or set "
            "mixed_precision to bf16 or no. The weights and the checkpoints are unchanged by these steps"
        )


def _describe(ref: SampleRef) -> str:
    return f"{ref.sample.dataset_id}/{ref.sample.path} (key {ref.sample.key[:12]})"
