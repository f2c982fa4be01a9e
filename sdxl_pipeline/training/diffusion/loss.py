"""Loss terms of the objective: weighting by signal-to-noise ratio, the pseudo-Huber loss, and Diff2Flow's velocity.

Weightings are functions of the SNR and apply to the squared error in x_0, which is the same error whatever the UNet predicts;
`Objective.weights` converts them into weights of the error in its prediction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sdxl_pipeline.config.schema.objective import ObjectiveSettings

Weighting = Callable[[Tensor], Tensor]
"""SNR (B,) -> weight of the squared error in x_0 (B,)."""

HuberSchedule = Literal["constant", "exponential", "snr"]


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Return min(SNR, gamma): Min-SNR-gamma of Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Return SNR gamma / (SNR + gamma), a smooth Min-SNR: Crowson et al. 2024, on hourglass diffusion transformers.

    With sigma^2 = 1 / SNR and gamma = 1 / sigma_data^2 it is their 1 / (sigma^2 + sigma_data^2).
    """
    return snr * gamma / (snr + gamma)


def debiased_estimation(snr: Tensor) -> Tensor:
    """Return sqrt(SNR), which weighs the squared error in eps by 1 / sqrt(SNR): Yu et al. 2023, "Debias the Training of Diffusion Models"."""
    return snr.sqrt()


def build_weighting(settings: ObjectiveSettings) -> Weighting | None:
    """Return the configured weighting; None weighs the error in the prediction uniformly."""
    if settings.debiased_estimation_loss:
        return debiased_estimation
    if settings.soft_min_snr_sigma_data is not None and settings.use_soft_min_snr:
        return partial(soft_min_snr, gamma=settings.soft_min_snr_sigma_data**-2)
    if settings.snr_gamma is None:
        return None
    return partial(soft_min_snr if settings.use_soft_min_snr else min_snr, gamma=settings.snr_gamma)


@dataclass(frozen=True)
class HuberLoss:
    """The pseudo-Huber loss (Charbonnier et al. 1997): quadratic for errors far below c, linear far above it.

        huber       2 c (sqrt(e^2 + c^2) - c)     about e^2 for small errors; slope 2 c for large ones
        smooth_l1   2 (sqrt(e^2 + c^2) - c)       about e^2 / c for small errors; slope 2 for large ones

    c may follow the timestep (Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss"), from 1 at low noise, where the loss is nearly the squared error, to about `c` at the highest noise:

        exponential   c^(t / T)
        snr           (1 - c) / (1 + sigma)^2 + c, with sigma^2 = (1 - abar) / abar
    """

    kind: Literal["huber", "smooth_l1"]
    schedule: HuberSchedule
    c: float

    def __call__(self, errors: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """Return the loss of each error, (B, C, H, W), at `timesteps` (B,) of the schedule `alphas_cumprod` (T,)."""
        c = self.thresholds(timesteps, alphas_cumprod)[:, None, None, None]
        squares = errors.square()
        # sqrt(e^2 + c^2) - c, rewritten to avoid cancellation for small errors
        excess = squares / ((squares + c.square()).sqrt() + c)
        return 2 * c * excess if self.kind == "huber" else 2 * excess

    def thresholds(self, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """Return the c of each timestep: (B,) float32."""
        if self.schedule == "constant":
            return torch.full_like(timesteps, self.c, dtype=torch.float32)
        if self.schedule == "exponential":
            return torch.exp(math.log(self.c) * timesteps / len(alphas_cumprod))
        abar = alphas_cumprod[timesteps]
        sigma = ((1 - abar) / abar).sqrt()
        return (1 - self.c) / (1 + sigma).square() + self.c


# Diff2Flow (Schusterbauer et al. 2025): the loss of a diffusion model's prediction as the velocity of a straight path from image to
# noise. With sigma^2 = (1 - abar) / abar, it equals the plain loss weighted by (1 + sigma)^2 for epsilon (1.2 at timestep 10 of SDXL's
# schedule, 244 at 999), and by (sqrt(abar) + sqrt(1 - abar))^2, between 1 and 2, for v-prediction, if x_t contains exactly the noise of
# the target.


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of the straight path x_0 + s (eps - x_0), s from 0 to 1."""
    return noise - latents


def flow_from_epsilon(epsilon: Tensor, noisy_latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity implied by a prediction of eps, for x_t = signal x_0 + sigma eps."""
    return epsilon - (noisy_latents - sigma * epsilon) / signal


def flow_from_velocity(velocity: Tensor, noisy_latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity implied by a prediction of v = signal eps - sigma x_0."""
    latents = signal * noisy_latents - sigma * velocity
    epsilon = signal * velocity + sigma * noisy_latents
    return epsilon - latents
