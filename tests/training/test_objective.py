"""The objective, against diffusers' own scheduler and the papers' formulas in a few independent lines."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdxl_pipeline.training.objective import Objective

SCHEDULER = DDPMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(6, 4, 8, 12, generator=generator) for _ in range(3))
    return latents, noise, prediction, torch.tensor([0, 10, 250, 500, 750, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_is_diffusers(batch, prediction_type, snr_gamma):
    latents, noise, prediction, timesteps = batch
    objective = Objective(SCHEDULER.alphas_cumprod, prediction_type, snr_gamma)
    target = noise if prediction_type == "epsilon" else SCHEDULER.get_velocity(latents, noise, timesteps)
    expected = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean([1, 2, 3])
    if snr_gamma is not None:
        snr = compute_snr(SCHEDULER, timesteps)
        divisor = snr if prediction_type == "epsilon" else snr + 1
        expected = expected * torch.minimum(snr, torch.full_like(snr, snr_gamma)) / divisor
    torch.testing.assert_close(
        objective.losses(prediction, latents, noise, timesteps), expected, rtol=1e-6, atol=1e-6
    )


def test_noise_is_added_as_diffusers_adds_it(batch):
    latents, noise, _, timesteps = batch
    objective = Objective(SCHEDULER.alphas_cumprod, "epsilon")
    torch.testing.assert_close(
        objective.add_noise(latents, noise, timesteps),
        SCHEDULER.add_noise(latents, noise, timesteps),
        rtol=1e-6,
        atol=1e-6,
    )


def test_both_predictions_weigh_the_same_error_in_x0_alike(batch):
    """Min-SNR's point: whatever the UNet predicts, an error in x_0 costs min(SNR, gamma) times its square."""
    latents, noise, _, timesteps = batch
    error = 0.1 * torch.ones_like(latents)
    abar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
    epsilon, velocity = (
        Objective(SCHEDULER.alphas_cumprod, kind, 5.0) for kind in ("epsilon", "v_prediction")
    )
    # x_t fixed: eps-hat errs by -sqrt(SNR) times the error in x_0, v-hat by -1/sqrt(1 - abar) times it
    by_epsilon = epsilon.losses(noise - (abar / (1 - abar)).sqrt() * error, latents, noise, timesteps)
    target = velocity.target(latents, noise, timesteps)
    by_velocity = velocity.losses(target - error / (1 - abar).sqrt(), latents, noise, timesteps)
    snr = compute_snr(SCHEDULER, timesteps)
    torch.testing.assert_close(by_epsilon, snr.clamp(max=5) * 0.01, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(by_velocity, by_epsilon, rtol=1e-3, atol=1e-6)


def test_a_half_precision_answer_is_judged_in_float32(batch):
    latents, noise, prediction, timesteps = batch
    objective = Objective(SCHEDULER.alphas_cumprod, "epsilon")
    losses = objective.losses(prediction.bfloat16(), latents, noise, timesteps)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses, objective.losses(prediction.bfloat16().float(), latents, noise, timesteps)
    )
