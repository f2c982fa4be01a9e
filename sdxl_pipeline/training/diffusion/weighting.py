"""How much the errors at a timestep count: weights of the squared error in x_0, as functions of the signal-to-noise ratio.

Written for the error in x_0, since that is the same error whatever the UNet predicts; `Objective.weights` turns them into weights of
the error in its prediction.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from sdxl_pipeline.config.schema.training import TrainingSettings

Weighting = Callable[[Tensor], Tensor]
"""SNR (B,) -> weight of the squared error in x_0 (B,)."""


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma): Min-SNR-gamma of Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """SNR gamma / (SNR + gamma), the same without the corner: Crowson et al. 2024, on hourglass diffusion transformers.

    With sigma^2 = 1 / SNR and gamma = 1 / sigma_data^2 it is their 1 / (sigma^2 + sigma_data^2).
    """
    return snr * gamma / (snr + gamma)


def debiased_estimation(snr: Tensor) -> Tensor:
    """sqrt(SNR), which weighs the squared error in eps by 1 / sqrt(SNR): Yu et al. 2023, "Debias the Training of Diffusion Models"."""
    return snr.sqrt()


def build_weighting(settings: TrainingSettings) -> Weighting | None:
    """The weighting that the settings ask for; None weighs the error in the prediction evenly."""
    if settings.debiased_estimation_loss:
        return debiased_estimation
    if settings.soft_min_snr_sigma_data is not None and settings.use_soft_min_snr:
        return partial(soft_min_snr, gamma=settings.soft_min_snr_sigma_data**-2)
    if settings.snr_gamma is None:
        return None
    return partial(soft_min_snr if settings.use_soft_min_snr else min_snr, gamma=settings.snr_gamma)
