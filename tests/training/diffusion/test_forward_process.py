"""Forward process: noise, offset noise, input perturbation and timesteps follow their distributions, for any number of processes."""

import numpy as np
import pytest
import torch

from sdxl_pipeline.config.schema.objective import NoiseSettings, ScheduledSamplingSettings
from sdxl_pipeline.training.diffusion.forward_process import (
    TimestepSampler,
    build_forward_process,
    build_noise_sampler,
    build_timestep_sampler,
)
from sdxl_pipeline.training.rng import derive_seed

SHAPE = (4, 8, 12)
SLOTS = 8


def noise_sampler_of(**settings):
    return build_noise_sampler(NoiseSettings(**settings))


def noise_of(count: int = 400, **settings) -> torch.Tensor:
    """Return the noise of `count` batches, (count, C, H, W)."""
    sampler = noise_sampler_of(**settings)
    return torch.stack([sampler.noise(SHAPE, 5, index, 0) for index in range(count)])


def test_noise_by_default_is_torch_randn():
    generator = torch.Generator().manual_seed(derive_seed(5, "noise", 3, 1))
    assert torch.equal(noise_sampler_of().noise(SHAPE, 5, 3, 1), torch.randn(SHAPE, generator=generator))


def test_offset_noise_is_constant_over_a_channel():
    offsets = noise_of(offset_noise=True, noise_offset=0.3, noise_offset_probability=1) - noise_of()
    assert (offsets.std(dim=(2, 3)) < 1e-6).all()
    per_channel = offsets.mean(dim=(2, 3))
    assert per_channel.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(per_channel.mean()) < 0.03
    correlation = torch.corrcoef(per_channel.T) - torch.eye(4)
    assert correlation.abs().max() < 0.2


def test_offset_noise_occurs_with_its_probability():
    changed = (noise_of(offset_noise=True) != noise_of()).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert not (noise_of(offset_noise=False, noise_offset=0.5) != noise_of()).any()
    assert not (noise_of(offset_noise=True, noise_offset_probability=0) != noise_of()).any()


def test_input_perturbation_leaves_the_target_noise_unchanged():
    sampler = noise_sampler_of(input_perturbation=0.1)
    noise = sampler.noise(SHAPE, 5, 3, 1)
    assert torch.equal(noise, noise_sampler_of().noise(SHAPE, 5, 3, 1))
    added = torch.stack([sampler.perturbed(noise, 0, 5, index, 0) for index in range(100)]) - noise
    assert added.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs((added * noise).mean()) < 0.003


def test_perturbation_decays_over_its_steps():
    sampler = noise_sampler_of(input_perturbation=0.2, input_perturbation_steps=10)
    assert [sampler.perturbation_at(step) for step in (0, 5, 9, 10, 11)] == pytest.approx(
        [0.2, 0.1, 0.02, 0, 0]
    )
    assert noise_sampler_of(input_perturbation=0.2).perturbation_at(10**6) == 0.2


def test_forward_process_with_accumulation_counts_optimizer_steps():
    noise = NoiseSettings(input_perturbation=0.2, input_perturbation_steps=2)
    forward_process = build_forward_process(noise, ScheduledSamplingSettings(), 1000, accumulation=3)
    perturbed = [forward_process.sample(SHAPE, 5, index, range(2), 2).perturbed_noise for index in range(8)]
    assert [each is not None for each in perturbed] == [True] * 6 + [False] * 2
    plain = [forward_process.sample(SHAPE, 5, index, range(2), 2).noise for index in range(6)]
    deviations = [
        (input_noise - noise).std().item() for input_noise, noise in zip(perturbed[:6], plain, strict=True)
    ]
    assert deviations == pytest.approx([0.2] * 3 + [0.1] * 3, rel=0.1)


@pytest.mark.parametrize("rank", [0, 1])
def test_forward_process_on_two_processes_equals_one_process(rank):
    noise = NoiseSettings(
        offset_noise=True,
        noise_offset_probability=0.5,
        input_perturbation=0.1,
        timestep_bias_strategy="earlier",
        timestep_bias_multiplier=2,
        disable_segmented_timestep_sampling=False,
    )
    rollouts = ScheduledSamplingSettings(
        scheduled_sampling_max_step_offset=4, scheduled_sampling_probability=0.7
    )
    forward_process = build_forward_process(noise, rollouts, 1000, 1)
    for index in range(12):
        full = forward_process.sample(SHAPE, 5, index, range(4), 4)
        part = forward_process.sample(SHAPE, 5, index, range(2 * rank, 2 * rank + 2), 4)
        slots = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(full.noise[slots], part.noise)
        assert torch.equal(full.perturbed_noise[slots], part.perturbed_noise)
        assert torch.equal(full.timesteps[slots], part.timesteps)
        expected = [
            (each.item - 2 * rank, each.source, each.target)
            for each in full.rollouts
            if each.item // 2 == rank
        ]
        assert [(each.item, each.source, each.target) for each in part.rollouts] == expected


def timesteps_of(batches: int = 1000, slots: int = SLOTS, seed: int = 5, **settings) -> np.ndarray:
    """Return the timesteps of global batches, (batches, slots)."""
    sampler = build_timestep_sampler(NoiseSettings(**settings), 1000)
    return np.array(
        [[sampler.sample(seed, index, slot, slots) for slot in range(slots)] for index in range(batches)]
    )


GOLDEN_TIMESTEPS = [156, 268, 709, 796, 296]


def test_timesteps_without_bias_equal_torch_randint():
    sampler = TimestepSampler(1000)
    for index, slot in ((0, 0), (3, 1), (70, 5)):
        generator = torch.Generator().manual_seed(derive_seed(5, "timestep", index, slot))
        assert sampler.sample(5, index, slot, SLOTS) == torch.randint(1000, (1,), generator=generator).item()
    # must not change between versions
    assert [sampler.sample(42, index, 0, 1) for index in range(5)] == GOLDEN_TIMESTEPS


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("bias", "biased_range"),
    [
        ({"timestep_bias_strategy": "earlier"}, range(250)),
        ({"timestep_bias_strategy": "later"}, range(750, 1000)),
        ({"timestep_bias_strategy": "later", "timestep_bias_portion": 0.1}, range(900, 1000)),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 200, "timestep_bias_end": 500},
            range(200, 500),
        ),
    ],
)
def test_timesteps_in_the_biased_range_are_multiplier_times_as_frequent(bias, biased_range, segmented):
    multiplier = 3.0
    timesteps = timesteps_of(
        **bias, timestep_bias_multiplier=multiplier, disable_segmented_timestep_sampling=not segmented
    )
    counts = np.bincount(timesteps.ravel(), minlength=1000)
    inside = np.zeros(1000, bool)
    inside[biased_range.start : biased_range.stop] = True
    ratio = counts[inside].mean() / counts[~inside].mean()
    assert ratio == pytest.approx(multiplier, rel=0.08)
    # uniform on either side
    for part in (counts[inside], counts[~inside]):
        assert part.var() / part.mean() < 1.5


@pytest.mark.parametrize("strategy", ["none", "earlier", "later", "range"])
def test_timesteps_with_multiplier_one_are_uniform(strategy):
    counts = np.histogram(timesteps_of(timestep_bias_strategy=strategy), bins=20, range=(0, 1000))[0]
    assert (np.abs(counts / 400 - 1) < 0.2).all()


def test_timesteps_segmented_batch_has_one_timestep_per_segment():
    timesteps = timesteps_of(200, disable_segmented_timestep_sampling=False)
    assert (np.sort(timesteps // 125, axis=1) == np.arange(SLOTS)).all()
    # every slot visits all segments, and all timesteps within a segment occur
    assert (np.abs(timesteps.mean(axis=0) - 499.5) < 80).all()
    assert abs((timesteps % 125).mean() - 62) < 3


def test_timesteps_segmented_batch_larger_than_the_schedule_repeats_timesteps():
    sampler = TimestepSampler(4, segmented=True)
    timesteps = sorted(sampler.sample(1, 0, slot, 8) for slot in range(8))
    assert timesteps == [0, 0, 1, 1, 2, 2, 3, 3]


def test_timesteps_segmented_with_bias_uses_equally_likely_segments():
    """Segments of equal length would cancel the bias."""
    settings = {
        "timestep_bias_strategy": "later",
        "timestep_bias_portion": 0.5,
        "timestep_bias_multiplier": 3,
    }
    timesteps = timesteps_of(300, 4, **settings, disable_segmented_timestep_sampling=False)
    assert (np.sort(timesteps, axis=1)[:, 1:] >= 500).all()  # three of four
    assert (np.sort(timesteps, axis=1)[:, 0] < 500).all()


@pytest.mark.parametrize("settings", [{}, {"disable_segmented_timestep_sampling": False}])
def test_timesteps_are_a_pure_function_of_seed_batch_and_slot(settings):
    first = timesteps_of(20, **settings)
    assert (first == timesteps_of(20, **settings)).all()
    assert (first != timesteps_of(20, seed=6, **settings)).any()
