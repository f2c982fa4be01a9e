"""The training objective: what the UNet predicts, and how its errors are weighted.

Weightings are functions of the SNR and apply to the squared error in x_0, which is the same error whatever the UNet predicts;
`Objective.weights` converts them into weights of the error in its prediction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdxl_pipeline.config.schema.objective import ObjectiveSettings
from sdxl_pipeline.models.model_files import SCHEDULER_CONFIG
from sdxl_pipeline.runtime.stage_runner import UserError

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


PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Objective:
    """The denoising objective over a discrete variance-preserving schedule (Ho et al. 2020).

    With abar_t the cumulative product of 1 - beta_t, x_0 the latents and eps the noise:

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          the UNet's input
        v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          the target of v-prediction (Salimans and Ho 2022)
        SNR(t) = abar_t / (1 - abar_t)

    All arithmetic is float32, whatever the UNet computes in. Raises UserError for a prediction type that it or `diff2flow` does not support.
    """

    alphas_cumprod: Tensor  # (T,) float32
    prediction_type: PredictionType
    weighting: Weighting | None = None
    """Weight of the squared error in x_0 as a function of SNR; None weighs the error in the prediction uniformly."""
    scale: float = 1.0
    """Factor applied to every loss."""
    huber: HuberLoss | None = None
    """Replaces the squared error."""
    diff2flow: bool = False
    """Compute the loss on the flow implied by the prediction."""

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise UserError(
                f"the base model's {SCHEDULER_CONFIG}: prediction_type is {self.prediction_type!r}, but this project trains UNets that "
                f"predict one of {', '.join(get_args(PredictionType))}. Use another base model, or, if the file is wrong, set "
                "prediction_type in config.json to what its UNet predicts"
            )
        if self.diff2flow and self.prediction_type == "sample":
            raise UserError(
                "diff2flow_loss needs a base model that predicts eps or v, but this one predicts the sample"
            )

    @classmethod
    def plain(cls, scheduler: DDPMScheduler) -> "Objective":
        """Return the unweighted squared error in the prediction, over the schedule of `scheduler`."""
        return cls(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)

    def to(self, device: torch.device) -> "Objective":
        """Return the objective with its schedule on a device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t for x_0 = `latents` (B, C, H, W) and eps = `noise`, at `timesteps` (B,)."""
        signal, sigma = self._scales(timesteps)
        return signal * latents + sigma * noise

    def unet_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the UNet's target: eps, v_t or x_0, (B, C, H, W)."""
        signal, sigma = self._scales(timesteps)
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return signal * noise - sigma * latents
            case "sample":
                return latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weight of each image's error, (B,).

        For the same x_t, an error in eps is one in x_0 times sqrt(SNR), and an error in v one times sqrt(SNR + 1): hence the division.
        """
        if self.weighting is None:
            return torch.full_like(timesteps, self.scale, dtype=torch.float32)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weights = self.weighting(snr)
        match self.prediction_type:
            case "epsilon":
                return weights / snr
            case "v_prediction":
                return weights / (snr + 1)
            case "sample":
                return weights

    def to_loss_space(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the loss compares for the UNet's output: `prediction` itself, or the flow it implies; (B, C, H, W) float32."""
        if not self.diff2flow:
            return prediction.float()
        signal, sigma = self._scales(timesteps)
        match self.prediction_type:
            case "epsilon":
                return flow_from_epsilon(prediction.float(), noisy_latents, signal, sigma)
            case "v_prediction":
                return flow_from_velocity(prediction.float(), noisy_latents, signal, sigma)
            case "sample":
                raise AssertionError("__post_init__ refuses diff2flow for this prediction type")

    def loss_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of `to_loss_space`, (B, C, H, W). The UNet's input may contain other noise than `noise`."""
        return flow_target(latents, noise) if self.diff2flow else self.unet_target(latents, noise, timesteps)

    def elementwise_loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """Return the loss of each element, not yet weighted by timestep, (B, C, H, W)."""
        error = prediction - target
        if self.huber is not None:
            return self.huber(error, timesteps, self.alphas_cumprod)
        return error.square()

    def per_sample_loss(self, elementwise_loss: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted mean of each sample's elements, (B,)."""
        return self.weights(timesteps) * elementwise_loss.mean(dim=(1, 2, 3))

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sqrt(abar), sqrt(1 - abar)), each (B, 1, 1, 1)."""
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def build_objective(settings: ObjectiveSettings, scheduler: DDPMScheduler) -> Objective:
    """Return the configured objective over the schedule of `scheduler`, to which the schedule settings are already applied.

    Raises UserError for a prediction type that the schedule or the loss does not support.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise UserError(
            "with rescale_betas_zero_snr the last timestep is pure noise, where a prediction of eps only repeats the input and carries no "
            "information about the image, so that no sampler can start from it. Set prediction_type to v_prediction for a base "
            "model that predicts v, or rescale_betas_zero_snr to false"
        )
    huber = (
        None
        if settings.loss_type == "l2"
        else HuberLoss(settings.loss_type, settings.huber_schedule, settings.huber_c)
    )
    return Objective(
        scheduler.alphas_cumprod.float(),
        prediction_type,
        weighting=build_weighting(settings),
        scale=settings.snr_weight,
        huber=huber,
        diff2flow=settings.diff2flow_loss,
    )
