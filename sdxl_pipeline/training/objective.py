"""What the UNet is trained to predict, and how its errors are weighted."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Objective:
    """The denoising objective over a discrete variance-preserving schedule (Ho et al. 2020).

    With abar_t the cumulative product of 1 - beta_t, x_0 the latents and eps the noise:

        x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps          what the UNet sees
        v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0          the target of v-prediction (Salimans and Ho 2022)
        SNR(t) = abar_t / (1 - abar_t)

    All arithmetic is float32, whatever the UNet computes in.
    """

    alphas_cumprod: Tensor  # (T,) float32
    prediction_type: PredictionType
    snr_gamma: float | None = None

    def to(self, device: torch.device) -> "Objective":
        """The same objective with its schedule on a device."""
        return Objective(self.alphas_cumprod.to(device), self.prediction_type, self.snr_gamma)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for x_0 = `latents` (B, C, H, W) and eps = `noise`, at `timesteps` (B,)."""
        signal, sigma = self._scales(timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should answer: eps or v_t, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._scales(timesteps)
        return signal * noise - sigma * latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each error, (B,): 1, or min-SNR-gamma (Hang et al. 2023), which weighs the error in x_0 by min(SNR, gamma).

        An error in eps is one in x_0 times sqrt(SNR), an error in v one times sqrt(SNR + 1): hence the division.
        """
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        alphas_cumprod = self.alphas_cumprod[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return snr.clamp(max=self.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)

    def losses(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Weighted mean squared error of each picture, (B,), for the UNet's answer `prediction` (B, C, H, W)."""
        error = prediction.float() - self.target(latents, noise, timesteps)
        return self.weights(timesteps) * error.square().mean(dim=(1, 2, 3))

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(abar), sqrt(1 - abar)), each (B, 1, 1, 1)."""
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
