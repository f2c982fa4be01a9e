"""What an error costs: its square, or less than that where it is large."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HuberSchedule = Literal["constant", "exponential", "snr"]


@dataclass(frozen=True)
class HuberLoss:
    """The pseudo-Huber loss (Charbonnier et al. 1997): quadratic for errors far below c, linear far above it.

        huber       2 c (sqrt(e^2 + c^2) - c)     about e^2 for small errors, so the slope of large ones is 2 c
        smooth_l1   2 (sqrt(e^2 + c^2) - c)       about e^2 / c for small errors, so the slope of large ones is 2

    c may follow the timestep (Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss"), from 1 where there is little noise, and the loss nearly the square, to about `c` where there is most:

        exponential   c^(t / T)
        snr           (1 - c) / (1 + sigma)^2 + c, with sigma^2 = (1 - abar) / abar
    """

    kind: Literal["huber", "smooth_l1"]
    schedule: HuberSchedule
    c: float

    def __call__(self, errors: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """Cost of each error, (B, C, H, W), at `timesteps` (B,) of the schedule `alphas_cumprod` (T,)."""
        c = self.thresholds(timesteps, alphas_cumprod)[:, None, None, None]
        squares = errors.square()
        # sqrt(e^2 + c^2) - c without the cancellation that would cost small errors their digits
        excess = squares / ((squares + c.square()).sqrt() + c)
        return 2 * c * excess if self.kind == "huber" else 2 * excess

    def thresholds(self, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """The c of each timestep: (B,) float32."""
        if self.schedule == "constant":
            return torch.full_like(timesteps, self.c, dtype=torch.float32)
        if self.schedule == "exponential":
            return torch.exp(math.log(self.c) * timesteps / len(alphas_cumprod))
        abar = alphas_cumprod[timesteps]
        sigma = ((1 - abar) / abar).sqrt()
        return (1 - self.c) / (1 + sigma).square() + self.c
