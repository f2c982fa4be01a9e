"""Holds: every objective, weighting and loss equals diffusers' own scheduler and the papers' formulas in a few independent lines."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.diffusion.objective import Objective, build_objective

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TIMESTEPS = torch.tensor([0, 10, 250, 500, 750, 999])
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(6, 4, 8, 12, generator=generator) for _ in range(3))
    return SimpleNamespace(latents=latents, noise=noise, prediction=prediction)


def scheduler_of(**changes) -> DDPMScheduler:
    return DDPMScheduler(**SCHEDULE, **changes)


def losses_of(batch, prediction_type: str, timesteps=TIMESTEPS, zero_snr=False, **settings) -> torch.Tensor:
    """By the code under test, from settings to losses."""
    scheduler = scheduler_of(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    objective = build_objective(TrainingSettings(**settings), scheduler)
    noisy = objective.add_noise(batch.latents, batch.noise, timesteps)
    prediction = objective.to_loss_space(batch.prediction, noisy, timesteps)
    errors = objective.elementwise_loss(
        prediction, objective.target(batch.latents, batch.noise, timesteps), timesteps
    )
    assert errors.shape == batch.latents.shape
    return objective.per_sample_loss(errors, timesteps)


def error_of(batch, prediction_type: str, timesteps=TIMESTEPS, zero_snr=False) -> torch.Tensor:
    """By diffusers."""
    scheduler = scheduler_of(rescale_betas_zero_snr=zero_snr)
    targets = {
        "epsilon": batch.noise,
        "v_prediction": scheduler.get_velocity(batch.latents, batch.noise, timesteps),
        "sample": batch.latents,
    }
    return batch.prediction - targets[prediction_type]


def sigmas_of(timesteps=TIMESTEPS) -> torch.Tensor:
    """Noise over signal, by another of diffusers' schedulers."""
    euler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    euler.set_timesteps(1000)
    return euler.sigmas[999 - timesteps]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_plain_loss_is_the_mean_squared_error(batch, prediction_type):
    expected = error_of(batch, prediction_type).square().mean((1, 2, 3))
    close(losses_of(batch, prediction_type), expected)
    close(losses_of(batch, prediction_type, snr_weight=0.3), 0.3 * expected)


# what an error in x_0 costs, as a function of sigma^2 = 1 / SNR
WEIGHTINGS = {
    "min-SNR": ({"snr_gamma": 5.0}, lambda sigma2: torch.minimum(1 / sigma2, torch.tensor(5.0))),
    "soft min-SNR": ({"snr_gamma": 5.0, "use_soft_min_snr": True}, lambda sigma2: 1 / (sigma2 + 1 / 5)),
    "soft min-SNR by sigma_data": (
        {"soft_min_snr_sigma_data": 0.5, "use_soft_min_snr": True},
        lambda sigma2: 1 / (sigma2 + 0.5**2),
    ),
    "debiased": ({"debiased_estimation_loss": True}, lambda sigma2: sigma2**-0.5),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_weightings_by_snr(batch, prediction_type, name):
    settings, weight_of_x0 = WEIGHTINGS[name]
    abar = scheduler_of().alphas_cumprod[TIMESTEPS]
    sigma2 = (1 - abar) / abar
    per_error = {"epsilon": sigma2, "v_prediction": 1 - abar, "sample": torch.ones(6)}[prediction_type]
    expected = weight_of_x0(sigma2) * per_error * error_of(batch, prediction_type).square().mean((1, 2, 3))
    found = losses_of(batch, prediction_type, **settings)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def test_min_snr_and_debiased_have_the_weights_of_their_papers(batch):
    """Hang et al. 2023 weigh the error in eps by min(SNR, gamma) / SNR, in v by min(SNR, gamma) / (SNR + 1); Yu et al. by SNR^-1/2."""
    snr = sigmas_of() ** -2
    plain = {kind: losses_of(batch, kind) for kind in ("epsilon", "v_prediction")}
    clipped = torch.minimum(snr, torch.tensor(5.0))
    for found, weight, kind in (
        (losses_of(batch, "epsilon", snr_gamma=5), clipped / snr, "epsilon"),
        (losses_of(batch, "v_prediction", snr_gamma=5), clipped / (snr + 1), "v_prediction"),
        (losses_of(batch, "epsilon", debiased_estimation_loss=True), snr**-0.5, "epsilon"),
    ):
        torch.testing.assert_close(found, weight * plain[kind], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_all_predictions_weigh_the_same_error_in_x0_alike(weighting):
    abar = scheduler_of().alphas_cumprod
    timesteps = torch.tensor([10, 500, 999])
    settings = TrainingSettings(**WEIGHTINGS[weighting][0])
    weights = {
        kind: build_objective(settings, scheduler_of(prediction_type=kind)).weights(timesteps)
        for kind in PREDICTION_TYPES
    }
    signal2 = abar[timesteps]
    # x_t fixed: eps-hat errs by sqrt(abar / (1 - abar)) times the error in x_0, v-hat by 1 / sqrt(1 - abar) times it
    torch.testing.assert_close(weights["epsilon"] * signal2 / (1 - signal2), weights["sample"])
    torch.testing.assert_close(weights["v_prediction"] / (1 - signal2), weights["sample"])


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pseudo_huber_losses(batch, prediction_type, loss_type, schedule):
    abar = scheduler_of().alphas_cumprod[TIMESTEPS].double()
    c = {
        "constant": torch.full((6,), 0.2, dtype=torch.float64),
        "exponential": torch.exp(-(-math.log(0.2) / 1000) * TIMESTEPS.double()),
        "snr": (1 - 0.2) / (1 + ((1 - abar) / abar).sqrt()) ** 2 + 0.2,
    }[schedule][:, None, None, None]
    error = error_of(batch, prediction_type).double()
    expected = 2 * ((error**2 + c**2).sqrt() - c) * (c if loss_type == "huber" else 1)
    found = losses_of(batch, prediction_type, loss_type=loss_type, huber_schedule=schedule, huber_c=0.2)
    close(found, expected.mean((1, 2, 3)).float())


def test_huber_is_the_square_of_small_errors_and_linear_in_large_ones():
    objective = build_objective(
        TrainingSettings(loss_type="huber", huber_schedule="constant", huber_c=0.1), scheduler_of()
    )
    timesteps = torch.tensor([500, 500])
    errors = torch.tensor([1e-4, 100.0])[:, None, None, None]
    small, large = objective.elementwise_loss(errors, torch.zeros_like(errors), timesteps).flatten()
    assert small.item() == pytest.approx(
        1e-8, rel=1e-5
    )  # sqrt(e^2 + c^2) - c itself would keep no digit of it
    assert large.item() == pytest.approx(2 * 0.1 * 100, rel=1e-2)


def test_min_snr_weighs_huber_losses_too(batch):
    plain = losses_of(batch, "epsilon", loss_type="huber")
    snr = sigmas_of() ** -2
    expected = plain * torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(
        losses_of(batch, "epsilon", loss_type="huber", snr_gamma=5), expected, rtol=2e-6, atol=1e-6
    )


def flow_losses(batch, prediction_type: str, **settings) -> torch.Tensor:
    return losses_of(batch, prediction_type, diff2flow_enabled=True, diff2flow_loss=True, **settings)


def test_diff2flow_is_the_reference_formula(batch):
    scheduler = scheduler_of()
    noisy = scheduler.add_noise(batch.latents, batch.noise, TIMESTEPS).double()
    abar = scheduler.alphas_cumprod[TIMESTEPS].double()[:, None, None, None]
    z = (noisy - (1 - abar).sqrt() * batch.prediction) / abar.sqrt()
    expected = (batch.prediction - z - (batch.noise - batch.latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(flow_losses(batch, "epsilon").double(), expected, rtol=1e-6, atol=1e-6)

    z = abar.sqrt() * noisy - (1 - abar).sqrt() * batch.prediction
    epsilon = abar.sqrt() * batch.prediction + (1 - abar).sqrt() * noisy
    expected = (epsilon - z - (batch.noise - batch.latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(flow_losses(batch, "v_prediction").double(), expected, rtol=1e-6, atol=1e-6)


def test_diff2flow_is_a_reweighting(batch):
    sigma = sigmas_of()
    weights = flow_losses(batch, "epsilon") / losses_of(batch, "epsilon")
    torch.testing.assert_close(weights, (1 + sigma) ** 2, rtol=1e-5, atol=0)
    assert weights[1].item() == pytest.approx(1.2, abs=0.05)  # timestep 10
    assert weights[5].item() == pytest.approx(244, abs=1)  # timestep 999

    abar = scheduler_of().alphas_cumprod[TIMESTEPS]
    weights = flow_losses(batch, "v_prediction") / losses_of(batch, "v_prediction")
    torch.testing.assert_close(weights, (abar.sqrt() + (1 - abar).sqrt()) ** 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_lin_et_al(batch, prediction_type):
    """Algorithm 1 of Lin et al. 2023: shift sqrt(abar) to end in 0, scale it to begin where it did."""
    root = scheduler_of().alphas_cumprod.double().sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    objective = build_objective(
        TrainingSettings(), scheduler_of(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    )
    torch.testing.assert_close(objective.alphas_cumprod.double(), abar, rtol=1e-4, atol=1e-9)
    assert objective.alphas_cumprod[-1] == 0
    last = torch.tensor([999] * 6)
    assert torch.equal(objective.add_noise(batch.latents, batch.noise, last), batch.noise)
    if prediction_type == "v_prediction":
        assert torch.equal(objective.prediction_target(batch.latents, batch.noise, last), -batch.latents)
    for settings in ({}, {"snr_gamma": 5.0}, {"loss_type": "huber"}, {"debiased_estimation_loss": True}):
        assert losses_of(batch, prediction_type, last, zero_snr=True, **settings).isfinite().all()
    expected = error_of(batch, prediction_type, zero_snr=True).square().mean((1, 2, 3))
    close(losses_of(batch, prediction_type, zero_snr=True), expected)


def test_the_flow_of_a_predicted_sample_is_refused():
    settings = TrainingSettings(diff2flow_enabled=True, diff2flow_loss=True)
    with pytest.raises(UserError, match="predicts the sample"):
        build_objective(settings, scheduler_of(prediction_type="sample"))


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(UserError, match=r"pure noise.*v_prediction"):
        build_objective(TrainingSettings(), scheduler_of(rescale_betas_zero_snr=True))


def test_noise_is_added_as_diffusers_adds_it(batch):
    objective = Objective(scheduler_of().alphas_cumprod, "epsilon")
    expected = scheduler_of().add_noise(batch.latents, batch.noise, TIMESTEPS)
    close(objective.add_noise(batch.latents, batch.noise, TIMESTEPS), expected)


@pytest.mark.parametrize("settings", [{}, {"diff2flow_enabled": True, "diff2flow_loss": True}])
def test_a_half_precision_answer_is_judged_in_float32(batch, settings):
    half = SimpleNamespace(**{**vars(batch), "prediction": batch.prediction.bfloat16()})
    rounded = SimpleNamespace(**{**vars(batch), "prediction": batch.prediction.bfloat16().float()})
    assert losses_of(half, "epsilon", **settings).dtype == torch.float32
    assert torch.equal(losses_of(half, "epsilon", **settings), losses_of(rounded, "epsilon", **settings))


def test_the_schedule_moves_with_the_objective():
    objective = build_objective(TrainingSettings(snr_gamma=5.0, loss_type="huber"), scheduler_of())
    moved = objective.to(torch.device("meta"))
    assert moved.alphas_cumprod.is_meta
    assert (moved.weighting, moved.huber) == (objective.weighting, objective.huber)
