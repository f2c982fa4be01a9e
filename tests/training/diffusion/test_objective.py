"""Every objective, weighting and loss equals diffusers' scheduler and the formulas of the papers in independent code."""

import math
from functools import partial
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
    """Return the losses of the code under test, from settings."""
    scheduler = scheduler_of(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    objective = build_objective(TrainingSettings(**settings), scheduler)
    noisy = objective.add_noise(batch.latents, batch.noise, timesteps)
    prediction = objective.to_loss_space(batch.prediction, noisy, timesteps)
    errors = objective.elementwise_loss(
        prediction, objective.loss_target(batch.latents, batch.noise, timesteps), timesteps
    )
    assert errors.shape == batch.latents.shape
    return objective.per_sample_loss(errors, timesteps)


def error_of(batch, prediction_type: str, timesteps=TIMESTEPS, zero_snr=False) -> torch.Tensor:
    """Return the error of the prediction, computed with diffusers."""
    scheduler = scheduler_of(rescale_betas_zero_snr=zero_snr)
    targets = {
        "epsilon": batch.noise,
        "v_prediction": scheduler.get_velocity(batch.latents, batch.noise, timesteps),
        "sample": batch.latents,
    }
    return batch.prediction - targets[prediction_type]


def sigmas_of(timesteps=TIMESTEPS) -> torch.Tensor:
    """Return noise over signal, computed with another diffusers scheduler."""
    euler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    euler.set_timesteps(1000)
    return euler.sigmas[999 - timesteps]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_per_sample_loss_by_default_is_the_mean_squared_error(batch, prediction_type):
    expected = error_of(batch, prediction_type).square().mean((1, 2, 3))
    assert_close(losses_of(batch, prediction_type), expected)
    assert_close(losses_of(batch, prediction_type, snr_weight=0.3), 0.3 * expected)


# weight of the squared error in x_0 as a function of sigma^2 = 1 / SNR
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
def test_per_sample_loss_weightings_equal_their_formulas(batch, prediction_type, name):
    settings, weight_of_x0 = WEIGHTINGS[name]
    abar = scheduler_of().alphas_cumprod[TIMESTEPS]
    sigma2 = (1 - abar) / abar
    per_error = {"epsilon": sigma2, "v_prediction": 1 - abar, "sample": torch.ones(6)}[prediction_type]
    expected = weight_of_x0(sigma2) * per_error * error_of(batch, prediction_type).square().mean((1, 2, 3))
    actual = losses_of(batch, prediction_type, **settings)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)


def test_per_sample_loss_min_snr_and_debiased_equal_their_papers(batch):
    """Hang et al. 2023 weigh the error in eps by min(SNR, gamma) / SNR, in v by min(SNR, gamma) / (SNR + 1); Yu et al. by SNR^-1/2."""
    snr = sigmas_of() ** -2
    plain = {kind: losses_of(batch, kind) for kind in ("epsilon", "v_prediction")}
    clipped = torch.minimum(snr, torch.tensor(5.0))
    for actual, weight, kind in (
        (losses_of(batch, "epsilon", snr_gamma=5), clipped / snr, "epsilon"),
        (losses_of(batch, "v_prediction", snr_gamma=5), clipped / (snr + 1), "v_prediction"),
        (losses_of(batch, "epsilon", debiased_estimation_loss=True), snr**-0.5, "epsilon"),
    ):
        torch.testing.assert_close(actual, weight * plain[kind], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_equivalent_in_x0_for_all_prediction_types(weighting):
    abar = scheduler_of().alphas_cumprod
    timesteps = torch.tensor([10, 500, 999])
    settings = TrainingSettings(**WEIGHTINGS[weighting][0])
    weights = {
        kind: build_objective(settings, scheduler_of(prediction_type=kind)).weights(timesteps)
        for kind in PREDICTION_TYPES
    }
    signal2 = abar[timesteps]
    # for fixed x_t the error in eps is sqrt(abar / (1 - abar)) times that in x_0, and the error in v 1 / sqrt(1 - abar) times
    torch.testing.assert_close(weights["epsilon"] * signal2 / (1 - signal2), weights["sample"])
    torch.testing.assert_close(weights["v_prediction"] / (1 - signal2), weights["sample"])


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_elementwise_loss_pseudo_huber_equals_its_formula(batch, prediction_type, loss_type, schedule):
    abar = scheduler_of().alphas_cumprod[TIMESTEPS].double()
    c = {
        "constant": torch.full((6,), 0.2, dtype=torch.float64),
        "exponential": torch.exp(-(-math.log(0.2) / 1000) * TIMESTEPS.double()),
        "snr": (1 - 0.2) / (1 + ((1 - abar) / abar).sqrt()) ** 2 + 0.2,
    }[schedule][:, None, None, None]
    error = error_of(batch, prediction_type).double()
    expected = 2 * ((error**2 + c**2).sqrt() - c) * (c if loss_type == "huber" else 1)
    actual = losses_of(batch, prediction_type, loss_type=loss_type, huber_schedule=schedule, huber_c=0.2)
    assert_close(actual, expected.mean((1, 2, 3)).float())


def test_huber_loss_is_quadratic_for_small_and_linear_for_large_errors():
    objective = build_objective(
        TrainingSettings(loss_type="huber", huber_schedule="constant", huber_c=0.1), scheduler_of()
    )
    timesteps = torch.tensor([500, 500])
    errors = torch.tensor([1e-4, 100.0])[:, None, None, None]
    small, large = objective.elementwise_loss(errors, torch.zeros_like(errors), timesteps).flatten()
    assert small.item() == pytest.approx(1e-8, rel=1e-5)  # sqrt(e^2 + c^2) - c itself would cancel all digits
    assert large.item() == pytest.approx(2 * 0.1 * 100, rel=1e-2)


def test_per_sample_loss_min_snr_applies_to_huber_loss(batch):
    plain = losses_of(batch, "epsilon", loss_type="huber")
    snr = sigmas_of() ** -2
    expected = plain * torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(
        losses_of(batch, "epsilon", loss_type="huber", snr_gamma=5), expected, rtol=2e-6, atol=1e-6
    )


def flow_losses(batch, prediction_type: str, **settings) -> torch.Tensor:
    return losses_of(batch, prediction_type, diff2flow_enabled=True, diff2flow_loss=True, **settings)


def test_diff2flow_loss_equals_the_reference_formula(batch):
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


def test_diff2flow_loss_is_a_reweighted_loss(batch):
    sigma = sigmas_of()
    weights = flow_losses(batch, "epsilon") / losses_of(batch, "epsilon")
    torch.testing.assert_close(weights, (1 + sigma) ** 2, rtol=1e-5, atol=0)
    assert weights[1].item() == pytest.approx(1.2, abs=0.05)  # timestep 10
    assert weights[5].item() == pytest.approx(244, abs=1)  # timestep 999

    abar = scheduler_of().alphas_cumprod[TIMESTEPS]
    weights = flow_losses(batch, "v_prediction") / losses_of(batch, "v_prediction")
    torch.testing.assert_close(weights, (abar.sqrt() + (1 - abar).sqrt()) ** 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_objective_zero_terminal_snr_equals_lin_et_al(batch, prediction_type):
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
        assert torch.equal(objective.unet_target(batch.latents, batch.noise, last), -batch.latents)
    for settings in ({}, {"snr_gamma": 5.0}, {"loss_type": "huber"}, {"debiased_estimation_loss": True}):
        assert losses_of(batch, prediction_type, last, zero_snr=True, **settings).isfinite().all()
    expected = error_of(batch, prediction_type, zero_snr=True).square().mean((1, 2, 3))
    assert_close(losses_of(batch, prediction_type, zero_snr=True), expected)


def test_build_objective_diff2flow_of_sample_prediction_raises():
    settings = TrainingSettings(diff2flow_enabled=True, diff2flow_loss=True)
    with pytest.raises(UserError, match="predicts the sample"):
        build_objective(settings, scheduler_of(prediction_type="sample"))


@pytest.mark.parametrize("build", [Objective.plain, partial(build_objective, TrainingSettings())])
def test_objective_of_other_prediction_type_raises(build):
    message = r"scheduler/scheduler_config\.json: prediction_type is 'flow_prediction'.*epsilon, v_prediction, sample.*set prediction_type"
    with pytest.raises(UserError, match=message):
        build(scheduler_of(prediction_type="flow_prediction"))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_objective_plain_is_unweighted_squared_error(batch, prediction_type):
    objective = Objective.plain(scheduler_of(prediction_type=prediction_type))
    target = objective.loss_target(batch.latents, batch.noise, TIMESTEPS)
    losses = objective.per_sample_loss(
        objective.elementwise_loss(batch.prediction, target, TIMESTEPS), TIMESTEPS
    )
    assert_close(losses, error_of(batch, prediction_type).square().mean((1, 2, 3)))


def test_build_objective_epsilon_with_zero_terminal_snr_raises():
    with pytest.raises(UserError, match=r"pure noise.*v_prediction"):
        build_objective(TrainingSettings(), scheduler_of(rescale_betas_zero_snr=True))


def test_add_noise_equals_diffusers(batch):
    objective = Objective(scheduler_of().alphas_cumprod, "epsilon")
    expected = scheduler_of().add_noise(batch.latents, batch.noise, TIMESTEPS)
    assert_close(objective.add_noise(batch.latents, batch.noise, TIMESTEPS), expected)


@pytest.mark.parametrize("settings", [{}, {"diff2flow_enabled": True, "diff2flow_loss": True}])
def test_per_sample_loss_of_half_precision_prediction_is_float32(batch, settings):
    half = SimpleNamespace(**{**vars(batch), "prediction": batch.prediction.bfloat16()})
    rounded = SimpleNamespace(**{**vars(batch), "prediction": batch.prediction.bfloat16().float()})
    assert losses_of(half, "epsilon", **settings).dtype == torch.float32
    assert torch.equal(losses_of(half, "epsilon", **settings), losses_of(rounded, "epsilon", **settings))


def test_objective_to_moves_the_schedule():
    objective = build_objective(TrainingSettings(snr_gamma=5.0, loss_type="huber"), scheduler_of())
    moved = objective.to(torch.device("meta"))
    assert moved.alphas_cumprod.is_meta
    assert (moved.weighting, moved.huber) == (objective.weighting, objective.huber)
