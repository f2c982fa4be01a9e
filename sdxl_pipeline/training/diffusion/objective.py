"""The training objective: what the UNet predicts, and how its errors are weighted."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdxl_pipeline.config.schema.objective import ObjectiveSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.diffusion.loss import (
    HuberLoss,
    Weighting,
    build_weighting,
    flow_from_epsilon,
    flow_from_velocity,
    flow_target,
)

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Objective:
    """The denoising objective over a discrete variance-preserving schedule (Ho et al. 2020).

    With abar_t the cumulative product of 1 - beta_t, x_0 the latents and eps the noise:

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          the UNet's input
        v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          the target of v-prediction (Salimans and Ho 2022)
        SNR(t) = abar_t / (1 - abar_t)

    All arithmetic is float32, whatever the UNet computes in.
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

    def to(self, device: torch.device) -> "Objective":
        """Return the objective with its schedule on a device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t for x_0 = `latents` (B, C, H, W) and eps = `noise`, at `timesteps` (B,)."""
        signal, sigma = self._scales(timesteps)
        return signal * latents + sigma * noise

    def prediction_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the UNet's target: eps, v_t or x_0, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._scales(timesteps)
        return signal * noise - sigma * latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weight of each image's error, (B,).

        For the same x_t, an error in eps is one in x_0 times sqrt(SNR), and an error in v one times sqrt(SNR + 1): hence the division.
        """
        if self.weighting is None:
            return torch.full_like(timesteps, self.scale, dtype=torch.float32)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weights = self.weighting(snr)
        if self.prediction_type == "epsilon":
            return weights / snr
        return weights / (snr + 1) if self.prediction_type == "v_prediction" else weights

    def to_loss_space(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the loss compares for the UNet's output: `prediction` itself, or the flow it implies; (B, C, H, W) float32."""
        if not self.diff2flow:
            return prediction.float()
        flow = flow_from_epsilon if self.prediction_type == "epsilon" else flow_from_velocity
        return flow(prediction.float(), noisy_latents, *self._scales(timesteps))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of `to_loss_space`, (B, C, H, W). The UNet's input may contain other noise than `noise`."""
        return (
            flow_target(latents, noise)
            if self.diff2flow
            else self.prediction_target(latents, noise, timesteps)
        )

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
    if settings.diff2flow_loss and prediction_type == "sample":
        raise UserError(
            "diff2flow_loss needs a base model that predicts eps or v, but this one predicts the sample"
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
