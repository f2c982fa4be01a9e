"""Holds: offset noise and input perturbation have their deviations, at their rates and steps, and leave plain noise as it was."""

import pytest
import torch

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.diffusion.forward_process import build_forward_process
from sdxl_pipeline.training.diffusion.noise import build_noise_sampler
from sdxl_pipeline.training.rng import derive_seed

SHAPE = (4, 8, 12)


def draw_of(**settings):
    return build_noise_sampler(TrainingSettings(**settings))


def drawn(count: int = 400, **settings) -> torch.Tensor:
    """(count, C, H, W)."""
    draw = draw_of(**settings)
    return torch.stack([draw.noise(SHAPE, 5, index, 0) for index in range(count)])


def test_plain_noise_is_what_torch_draws():
    generator = torch.Generator().manual_seed(derive_seed(5, "noise", 3, 1))
    assert torch.equal(draw_of().noise(SHAPE, 5, 3, 1), torch.randn(SHAPE, generator=generator))


def test_offset_noise_is_one_number_for_a_channel():
    offsets = drawn(offset_noise=True, noise_offset=0.3, noise_offset_probability=1) - drawn()
    assert (offsets.std(dim=(2, 3)) < 1e-6).all()
    per_channel = offsets.mean(dim=(2, 3))
    assert per_channel.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(per_channel.mean()) < 0.03
    correlation = torch.corrcoef(per_channel.T) - torch.eye(4)
    assert correlation.abs().max() < 0.2


def test_offset_noise_comes_at_its_rate():
    changed = (drawn(offset_noise=True) != drawn()).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert not (drawn(offset_noise=False, noise_offset=0.5) != drawn()).any()
    assert not (drawn(offset_noise=True, noise_offset_probability=0) != drawn()).any()


def test_what_is_asked_for_is_not_perturbed():
    draw = draw_of(input_perturbation=0.1)
    noise = draw.noise(SHAPE, 5, 3, 1)
    assert torch.equal(noise, draw_of().noise(SHAPE, 5, 3, 1))
    added = torch.stack([draw.perturbed(noise, 0, 5, index, 0) for index in range(100)]) - noise
    assert added.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs((added * noise).mean()) < 0.003


def test_perturbation_fades_over_its_steps():
    draw = draw_of(input_perturbation=0.2, input_perturbation_steps=10)
    assert [draw.perturbation_at(step) for step in (0, 5, 9, 10, 11)] == pytest.approx([0.2, 0.1, 0.02, 0, 0])
    assert draw_of(input_perturbation=0.2).perturbation_at(10**6) == 0.2


def test_steps_are_counted_in_optimizer_steps():
    settings = {"input_perturbation": 0.2, "input_perturbation_steps": 2, "gradient_accumulation_steps": 3}
    forward_process = build_forward_process(TrainingSettings(**settings), 1000)
    perturbed = [forward_process.draw(SHAPE, 5, index, range(2), 2).perturbed_noise for index in range(8)]
    assert [each is not None for each in perturbed] == [True] * 6 + [False] * 2
    plain = [forward_process.draw(SHAPE, 5, index, range(2), 2).noise for index in range(6)]
    deviations = [(seen - noise).std().item() for seen, noise in zip(perturbed[:6], plain, strict=True)]
    assert deviations == pytest.approx([0.2] * 3 + [0.1] * 3, rel=0.1)


@pytest.mark.parametrize("rank", [0, 1])
def test_draws_are_the_same_on_one_process_and_on_two(rank):
    settings = {
        "offset_noise": True,
        "noise_offset_probability": 0.5,
        "input_perturbation": 0.1,
        "timestep_bias_strategy": "earlier",
        "timestep_bias_multiplier": 2,
        "disable_segmented_timestep_sampling": False,
        "scheduled_sampling_max_step_offset": 4,
        "scheduled_sampling_probability": 0.7,
    }
    forward_process = build_forward_process(TrainingSettings(**settings), 1000)
    for index in range(12):
        whole = forward_process.draw(SHAPE, 5, index, range(4), 4)
        part = forward_process.draw(SHAPE, 5, index, range(2 * rank, 2 * rank + 2), 4)
        own = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(whole.noise[own], part.noise)
        assert torch.equal(whole.perturbed_noise[own], part.perturbed_noise)
        assert torch.equal(whole.timesteps[own], part.timesteps)
        expected = [
            (each.item - 2 * rank, each.source, each.target)
            for each in whole.rollouts
            if each.item // 2 == rank
        ]
        assert [(each.item, each.source, each.target) for each in part.rollouts] == expected
