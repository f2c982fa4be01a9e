"""Rollouts follow the model's ODE with every solver, jointly and individually; offsets and ramps follow the settings."""

from collections import Counter

import pytest
import torch
from diffusers import DDPMScheduler

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.diffusion.scheduled_sampling import (
    Rollout,
    build_rollout_sampler,
    build_solver,
    roll_out,
)

SOLVERS = ("unipc", "euler", "dpm")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ROLLOUTS = (Rollout(0, 520, 500), Rollout(2, 999, 990), Rollout(3, 7, 0))
TARGETS = torch.tensor([500, 100, 990, 0])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return latents, noise


def solver_of(name: str, scheduler: DDPMScheduler, **settings):
    return build_solver(TrainingSettings(scheduled_sampling_sampler=name, **settings), scheduler)


def perfect_prediction(prediction_type: str, latents, noise, abar):
    """Return the prediction of a UNet of this type that knows x_0 = `latents` and eps = `noise`."""
    abar = abar[:, None, None, None]
    return {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * latents,
    }[prediction_type]


@pytest.mark.parametrize(
    ("kind", "zero_snr"),
    [
        ("epsilon", False),
        ("v_prediction", False),
        ("v_prediction", True),
        ("sample", False),
        ("sample", True),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_roll_out_with_perfect_prediction_equals_the_forward_process(batch, name, kind, zero_snr):
    """With a perfect prediction every solver step is exact, so x_t equals that of plain training for the same noise."""
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=kind, rescale_betas_zero_snr=zero_snr)
    latents, noise = batch
    calls: list[tuple[list[int], list[int]]] = []

    def predict(noisy, timesteps, items):
        assert not torch.is_grad_enabled()
        calls.append((timesteps.tolist(), items.tolist()))
        return perfect_prediction(kind, latents[items], noise[items], scheduler.alphas_cumprod[timesteps])

    plain = scheduler.add_noise(latents, noise, TARGETS)
    rolled = roll_out(plain, latents, noise, ROLLOUTS, solver_of(name, scheduler), predict)
    torch.testing.assert_close(rolled, plain, rtol=0, atol=2e-3 if zero_snr else 2e-4)
    assert torch.equal(rolled[1], plain[1])  # not rolled out: unchanged bit for bit
    assert not torch.equal(rolled[0], plain[0])
    # every timestep in between, batched over the remaining items
    assert calls[0] == ([520, 999, 7], [0, 2, 3])
    assert calls[8] == ([512, 991], [0, 2])
    assert calls[19] == ([501], [0])
    assert len(calls) == 20


def nonlinear_unet(noisy, timesteps, items):
    """A stand-in for a UNet that depends nonlinearly on all of its inputs."""
    phase = timesteps[:, None, None, None] / 100 + items[:, None, None, None]
    return torch.tanh(noisy.roll(1, dims=-1)) + 0.3 * torch.sin(phase + noisy)


def test_roll_out_euler_equals_ddim(batch):
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    plain = scheduler.add_noise(latents, noise, TARGETS)
    rolled = roll_out(plain, latents, noise, ROLLOUTS, solver_of("euler", scheduler), nonlinear_unet)
    abar = scheduler.alphas_cumprod
    for item, source, target in ((each.item, each.source, each.target) for each in ROLLOUTS):
        x = scheduler.add_noise(latents[item, None], noise[item, None], torch.tensor([source]))
        for t in range(
            source, target, -1
        ):  # Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 with sigma 0
            epsilon = nonlinear_unet(x, torch.tensor([t]), torch.tensor([item]))
            x0 = (x - (1 - abar[t]).sqrt() * epsilon) / abar[t].sqrt()
            x = abar[t - 1].sqrt() * x0 + (1 - abar[t - 1]).sqrt() * epsilon
        torch.testing.assert_close(rolled[item], x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "order"), [("unipc", 1), ("unipc", 2), ("unipc", 3), ("dpm", 2), ("dpm", 3)]
)
def test_roll_out_multistep_solvers_are_closer_to_the_exact_solution(batch, name, order):
    """For Gaussian data N(0, s^2) the optimal prediction is linear, and the ODE has the solution x_t ~ sqrt(abar s^2 + 1 - abar)."""
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    std = 0.3
    rollouts = (Rollout(0, 400, 300),)

    def variance(timestep):
        abar = scheduler.alphas_cumprod[timestep]
        return abar * std**2 + 1 - abar

    def predict(noisy, timesteps, items):
        weight = (1 - scheduler.alphas_cumprod[timesteps]).sqrt() / variance(timesteps)
        return weight[:, None, None, None] * noisy

    start = scheduler.add_noise(latents, noise, torch.tensor([400] * 4))
    exact = start[0] * (variance(300) / variance(400)).sqrt()

    def distance(solver: str, solver_order: int) -> float:
        settings = {"scheduled_sampling_order": solver_order}
        rolled = roll_out(start, latents, noise, rollouts, solver_of(solver, scheduler, **settings), predict)
        return (rolled[0] - exact).abs().max().item()

    assert distance("euler", 1) < 1e-2
    assert distance(name, order) < distance("euler", 1) / (3 if order == 1 else 10)


@pytest.mark.parametrize("name", SOLVERS)
def test_roll_out_of_a_batch_equals_single_items(batch, name):
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    plain = scheduler.add_noise(latents, noise, TARGETS)
    batched = roll_out(plain, latents, noise, ROLLOUTS, solver_of(name, scheduler), nonlinear_unet)
    for rollout in ROLLOUTS:
        single = roll_out(plain, latents, noise, (rollout,), solver_of(name, scheduler), nonlinear_unet)
        torch.testing.assert_close(single[rollout.item], batched[rollout.item], rtol=1e-5, atol=1e-5)
        others = [item for item in range(4) if item != rollout.item]
        assert torch.equal(single[others], plain[others])


def sampler_of(**settings):
    values = {f"scheduled_sampling_{key}": value for key, value in settings.items()}
    return build_rollout_sampler(TrainingSettings(**values), 1000)


def test_rollout_sampler_disabled_returns_no_rollouts():
    assert sampler_of() is None
    assert sampler_of(max_step_offset=3).sample([5] * 50, 0, 1, 0, range(50)) == ()


def offsets_of(timestep: int, count: int = 4000, **settings) -> Counter:
    rollouts = sampler_of(**settings).sample([timestep] * count, 0, 1, 0, range(count))
    assert all(each.target == timestep for each in rollouts)
    found = Counter(each.source - each.target for each in rollouts)
    found[0] = count - found.total()
    return found


def test_rollout_offsets_are_uniform_up_to_the_maximum():
    found = offsets_of(500, max_step_offset=4, probability=1)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(abs(count / 800 - 1) < 0.12 for count in found.values())


def test_rollout_offsets_occur_with_their_probability():
    found = offsets_of(500, max_step_offset=4, probability=0.5)
    assert found[0] / 4000 == pytest.approx(0.5 + 0.5 / 5, abs=0.03)


def test_rollout_offsets_biased_strategies_shift_the_mean():
    early = offsets_of(500, max_step_offset=4, probability=1, strategy="biased_early")
    late = offsets_of(500, max_step_offset=4, probability=1, strategy="biased_late")
    assert early[0] > early[1] > early[4]
    assert late[4] > late[3] > late[0]
    mean = sum(offset * count for offset, count in early.items()) / 4000
    assert mean == pytest.approx(4 / 3, abs=0.1)  # mean of 4 u^2


def test_rollout_offsets_stay_within_the_schedule():
    found = offsets_of(997, max_step_offset=9, probability=1)
    assert sorted(found) == [0, 1, 2]
    assert offsets_of(999, max_step_offset=9, probability=1) == {0: 4000}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"probability": 0.7}, {0: 0.7, 10**6: 0.7}),
        ({"probability": 0.7, "start_step": 10}, {9: 0, 10: 0.7}),
        ({"ramp_steps": 10}, {0: 0, 5: 0.25, 10: 0.5, 99: 0.5}),
        (
            {"ramp_steps": 10, "start_step": 4, "prob_start": 0.2, "prob_end": 1},
            {0: 0.2, 4: 0.2, 9: 0.6, 14: 1},
        ),
        ({"ramp_steps": 8, "ramp_shape": "cosine", "prob_end": 1}, {0: 0, 2: 0.1464466, 4: 0.5, 8: 1}),
    ],
)
def test_rollout_probability_follows_the_ramp(settings, expected):
    sampler = sampler_of(max_step_offset=3, **settings)
    assert {step: sampler.probability_at(step) for step in expected} == pytest.approx(expected)
