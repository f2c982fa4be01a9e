"""Length and learning-rate schedule of a training, limited by wall time and by a number of steps."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class Budget:
    """A training ends after `seconds` of wall time or `max_steps`, whichever comes first."""

    seconds: float
    max_steps: int
    started: float = field(default_factory=time.monotonic)

    def spent(self, step: int) -> float:
        """Return the used share of the budget before `step`; at least 1 if it is exhausted."""
        return max((time.monotonic() - self.started) / self.seconds, step / self.max_steps)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started


def set_learning_rate(
    optimizer: Optimizer, peak: float, step: int, spent: float, *, warmup_steps: int = 100, hold: float = 0.0
) -> float:
    """Set and return the learning rate: linear warm-up, `peak` until the share `hold` of the budget, then a cosine to a fiftieth of it."""
    falling = 0.0 if spent < hold else (spent - hold) / (1 - hold)
    rate = (
        peak * min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def update_average(average: list[Tensor], current: list[Tensor], step: int, decay: float) -> None:
    """Update the exponential average of the weights; early steps have a larger weight, so that the initial weights are forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, weight)
