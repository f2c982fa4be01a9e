"""Learning-rate schedules, by their names in the settings."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdxl_pipeline.config.schema.optimization import OptimizationSettings

Shape = Callable[[float], float]
"""Progress after the warm-up, in [0, 1] -> position between `lr_end` (0) and the peak (1)."""


class Schedule(LambdaLR):
    """LambdaLR whose state is plain numbers, even if the optimizer stores its learning rate in a tensor (as torchao's do)."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
        super().__init__(optimizer, factor)

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the next step, recomputed to avoid a device synchronization."""
        return [rate * self.lr_lambdas[0](self.last_epoch) for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {**super().state_dict(), "_last_lr": self.get_last_lr()}


def build_schedule(settings: OptimizationSettings, optimizer: Optimizer, total_steps: int) -> Schedule:
    """Return the schedule of a run; step it once per optimizer step, whatever the number of processes.

    A schedule-free optimizer does its own warm-up and otherwise has a constant rate.
    """
    if settings.is_schedule_free:
        return Schedule(optimizer, lambda step: 1.0)
    peak = float(optimizer.param_groups[0]["lr"])
    return Schedule(optimizer, learning_rate_factor(settings, peak, total_steps))


def learning_rate_factor(
    settings: OptimizationSettings, peak: float, total_steps: int
) -> Callable[[int], float]:
    """Return the factor of the peak learning rate as a function of the step, counted from 0.

    With w warm-up steps, N steps, b = lr_end / peak and p = (step - w) / (N - w):

        constant              1, without a warm-up
        constant_with_warmup  1
        linear                1 - p
        cosine                b + (1 - b) (1 + cos(pi p)) / 2
        cosine_with_restarts  b + (1 - b) (1 + cos(pi (p c mod 1))) / 2 with c = lr_num_cycles (Loshchilov and Hutter 2017, equal cycles)
        polynomial            b + (1 - b) (1 - p)^lr_power
        sine                  b + (1 - b) (1 + sin(pi step / w)) / 2: a wave over the whole run, w steps from peak to trough

    all but `constant` and `sine` after a linear rise from 0 over the warm-up. `polynomial` and `sine` are SimpleTuner's; the others are
    those of diffusers, which have no `lr_end`.
    """
    name, warmup = settings.lr_scheduler, settings.lr_warmup_steps
    bottom = settings.effective_lr_end / peak
    if name == "constant":
        return lambda step: 1.0
    if name == "sine":
        return lambda step: bottom + (1 - bottom) * 0.5 * (1 + math.sin(math.pi * step / warmup))
    shape = _shape(settings)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return bottom + (1 - bottom) * shape(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return factor


def _shape(settings: OptimizationSettings) -> Shape:
    cycles, power = settings.lr_num_cycles, settings.lr_power
    shapes: dict[str, Shape] = {
        "constant_with_warmup": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "cosine_with_restarts": lambda progress: (
            0.0 if progress >= 1 else 0.5 * (1.0 + math.cos(math.pi * (cycles * progress % 1.0)))
        ),
        "polynomial": lambda progress: (1.0 - progress) ** power,
    }
    return shapes[settings.lr_scheduler]
