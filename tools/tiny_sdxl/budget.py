"""How long a training goes on and how its learning rate falls: by the clock, up to a number of steps."""

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
        """Share of the budget used before `step`, at least 1 when it is over."""
        return max((time.monotonic() - self.started) / self.seconds, step / self.max_steps)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


def set_learning_rate(
    optimizer: Optimizer, peak: float, step: int, spent: float, *, warmup_steps: int = 100, hold: float = 0.0
) -> float:
    """Linear warm-up, `peak` until the share `hold` of the budget, then a cosine down to a fiftieth of it."""
    falling = 0.0 if spent < hold else (spent - hold) / (1 - hold)
    rate = (
        peak * min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def update_average(average: list[Tensor], current: list[Tensor], step: int, decay: float) -> None:
    """Moves the exponential average of the weights; the first steps count more, so the start is forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, weight)
