"""Holds: rollouts land where the model's own ODE leads, by every solver, together as alone; offsets and ramps are as asked."""

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


def answer(kind: str, latents, noise, abar):
    """What a UNet of this kind says that takes x_0 for `latents` and eps for `noise`."""
    abar = abar[:, None, None, None]
    return {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * latents,
    }[kind]


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
def test_a_model_that_knows_the_image_changes_nothing(batch, name, kind, zero_snr):
    """Of a perfect answer every solver's step is exact, so x_t is what plain training would have made of the same noise."""
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=kind, rescale_betas_zero_snr=zero_snr)
    latents, noise = batch
    seen: list[tuple[list[int], list[int]]] = []

    def predict(noisy, timesteps, items):
        assert not torch.is_grad_enabled()
        seen.append((timesteps.tolist(), items.tolist()))
        return answer(kind, latents[items], noise[items], scheduler.alphas_cumprod[timesteps])

    plain = scheduler.add_noise(latents, noise, TARGETS)
    rolled = roll_out(plain, latents, noise, ROLLOUTS, solver_of(name, scheduler), predict)
    torch.testing.assert_close(rolled, plain, rtol=0, atol=2e-3 if zero_snr else 2e-4)
    assert torch.equal(rolled[1], plain[1])  # not rolled out: the very same bits
    assert not torch.equal(rolled[0], plain[0])
    # every timestep between, each item's own, and together as long as there are any left
    assert seen[0] == ([520, 999, 7], [0, 2, 3])
    assert seen[8] == ([512, 991], [0, 2])
    assert seen[19] == ([501], [0])
    assert len(seen) == 20


def bent(noisy, timesteps, items):
    """A stand-in for a UNet: depends on everything that it is given, not linearly."""
    phase = timesteps[:, None, None, None] / 100 + items[:, None, None, None]
    return torch.tanh(noisy.roll(1, dims=-1)) + 0.3 * torch.sin(phase + noisy)


def test_euler_is_ddim_in_a_few_lines(batch):
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    plain = scheduler.add_noise(latents, noise, TARGETS)
    rolled = roll_out(plain, latents, noise, ROLLOUTS, solver_of("euler", scheduler), bent)
    abar = scheduler.alphas_cumprod
    for item, source, target in ((each.item, each.source, each.target) for each in ROLLOUTS):
        x = scheduler.add_noise(latents[item, None], noise[item, None], torch.tensor([source]))
        for t in range(
            source, target, -1
        ):  # Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 with sigma 0
            epsilon = bent(x, torch.tensor([t]), torch.tensor([item]))
            x0 = (x - (1 - abar[t]).sqrt() * epsilon) / abar[t].sqrt()
            x = abar[t - 1].sqrt() * x0 + (1 - abar[t - 1]).sqrt() * epsilon
        torch.testing.assert_close(rolled[item], x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "order"), [("unipc", 1), ("unipc", 2), ("unipc", 3), ("dpm", 2), ("dpm", 3)]
)
def test_multistep_solvers_come_closer_to_the_true_path(batch, name, order):
    """Of Gaussian data N(0, s^2) the UNet's best answer is linear, and its ODE has the solution x_t ~ sqrt(abar s^2 + 1 - abar)."""
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    spread = 0.3
    rollouts = (Rollout(0, 400, 300),)

    def variance(timestep):
        abar = scheduler.alphas_cumprod[timestep]
        return abar * spread**2 + 1 - abar

    def predict(noisy, timesteps, items):
        weight = (1 - scheduler.alphas_cumprod[timesteps]).sqrt() / variance(timesteps)
        return weight[:, None, None, None] * noisy

    start = scheduler.add_noise(latents, noise, torch.tensor([400] * 4))
    true = start[0] * (variance(300) / variance(400)).sqrt()

    def distance(solver: str, solver_order: int) -> float:
        settings = {"scheduled_sampling_order": solver_order}
        rolled = roll_out(start, latents, noise, rollouts, solver_of(solver, scheduler, **settings), predict)
        return (rolled[0] - true).abs().max().item()

    assert distance("euler", 1) < 1e-2
    assert distance(name, order) < distance("euler", 1) / (3 if order == 1 else 10)


@pytest.mark.parametrize("name", SOLVERS)
def test_items_go_together_as_they_go_alone(batch, name):
    scheduler = DDPMScheduler(**SCHEDULE)
    latents, noise = batch
    plain = scheduler.add_noise(latents, noise, TARGETS)
    together = roll_out(plain, latents, noise, ROLLOUTS, solver_of(name, scheduler), bent)
    for rollout in ROLLOUTS:
        alone = roll_out(plain, latents, noise, (rollout,), solver_of(name, scheduler), bent)
        torch.testing.assert_close(alone[rollout.item], together[rollout.item], rtol=1e-5, atol=1e-5)
        others = [item for item in range(4) if item != rollout.item]
        assert torch.equal(alone[others], plain[others])


def draw_of(**settings):
    named = {f"scheduled_sampling_{key}": value for key, value in settings.items()}
    return build_rollout_sampler(TrainingSettings(**named), 1000)


def test_off_is_off():
    assert draw_of() is None
    assert draw_of(max_step_offset=3).draw([5] * 50, 0, 1, 0, range(50)) == ()


def offsets_of(timestep: int, count: int = 4000, **settings) -> Counter:
    rollouts = draw_of(**settings).draw([timestep] * count, 0, 1, 0, range(count))
    assert all(each.target == timestep for each in rollouts)
    found = Counter(each.source - each.target for each in rollouts)
    found[0] = count - found.total()
    return found


def test_offsets_are_uniform_from_0_to_the_most():
    found = offsets_of(500, max_step_offset=4, probability=1)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert all(abs(count / 800 - 1) < 0.12 for count in found.values())


def test_offsets_come_at_their_probability():
    found = offsets_of(500, max_step_offset=4, probability=0.5)
    assert found[0] / 4000 == pytest.approx(0.5 + 0.5 / 5, abs=0.03)


def test_biased_offsets():
    early = offsets_of(500, max_step_offset=4, probability=1, strategy="biased_early")
    late = offsets_of(500, max_step_offset=4, probability=1, strategy="biased_late")
    assert early[0] > early[1] > early[4]
    assert late[4] > late[3] > late[0]
    mean = sum(offset * count for offset, count in early.items()) / 4000
    assert mean == pytest.approx(4 / 3, abs=0.1)  # of 4 u^2


def test_no_rollout_begins_beyond_the_schedule():
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
def test_ramps(settings, expected):
    draw = draw_of(max_step_offset=3, **settings)
    assert {step: draw.probability_at(step) for step in expected} == pytest.approx(expected)
