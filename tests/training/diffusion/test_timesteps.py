"""Holds: the timesteps of the bias strategies and of segments follow their distributions, for any number of processes."""

import numpy as np
import pytest
import torch

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.diffusion.timesteps import TimestepSampler, build_timestep_sampler
from sdxl_pipeline.training.rng import derive_seed

SLOTS = 8


def drawn(batches: int = 1000, slots: int = SLOTS, seed: int = 5, **settings) -> np.ndarray:
    """(batches, slots)."""
    draw = build_timestep_sampler(TrainingSettings(**settings), 1000)
    return np.array(
        [[draw.draw(seed, index, slot, slots) for slot in range(slots)] for index in range(batches)]
    )


def test_unbiased_timesteps_are_those_of_torch():
    draw = TimestepSampler(1000)
    for index, slot in ((0, 0), (3, 1), (70, 5)):
        generator = torch.Generator().manual_seed(derive_seed(5, "timestep", index, slot))
        assert draw.draw(5, index, slot, SLOTS) == torch.randint(1000, (1,), generator=generator).item()
    assert [
        draw.draw(42, index, 0, 1) for index in range(5)
    ] == GOLDEN  # a run of today is the run of yesterday


GOLDEN = [156, 268, 709, 796, 296]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("bias", "favoured"),
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
def test_favoured_timesteps_come_multiplier_times_as_often(bias, favoured, segmented):
    multiplier = 3.0
    found = drawn(
        **bias, timestep_bias_multiplier=multiplier, disable_segmented_timestep_sampling=not segmented
    )
    counts = np.bincount(found.ravel(), minlength=1000)
    inside = np.zeros(1000, bool)
    inside[favoured.start : favoured.stop] = True
    rate = counts[inside].mean() / counts[~inside].mean()
    assert rate == pytest.approx(multiplier, rel=0.08)
    # and evenly on either side
    for part in (counts[inside], counts[~inside]):
        assert part.var() / part.mean() < 1.5


@pytest.mark.parametrize("strategy", ["none", "earlier", "later", "range"])
def test_without_a_bias_all_come_alike(strategy):
    counts = np.histogram(drawn(timestep_bias_strategy=strategy), bins=20, range=(0, 1000))[0]
    assert (np.abs(counts / 400 - 1) < 0.2).all()


def test_a_segmented_batch_has_one_timestep_of_each_part():
    found = drawn(200, disable_segmented_timestep_sampling=False)
    assert (np.sort(found // 125, axis=1) == np.arange(SLOTS)).all()
    # no slot keeps to one part, and within the parts all timesteps come
    assert (np.abs(found.mean(axis=0) - 499.5) < 80).all()
    assert abs((found % 125).mean() - 62) < 3


def test_a_segmented_batch_of_more_than_there_are_timesteps():
    draw = TimestepSampler(4, segmented=True)
    found = sorted(draw.draw(1, 0, slot, 8) for slot in range(8))
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]


def test_segments_with_a_bias_are_equally_likely_parts():
    """The bias is kept, where drawing from parts of equal length would undo it."""
    settings = {
        "timestep_bias_strategy": "later",
        "timestep_bias_portion": 0.5,
        "timestep_bias_multiplier": 3,
    }
    found = drawn(300, 4, **settings, disable_segmented_timestep_sampling=False)
    assert (np.sort(found, axis=1)[:, 1:] >= 500).all()  # three of four
    assert (np.sort(found, axis=1)[:, 0] < 500).all()


@pytest.mark.parametrize("settings", [{}, {"disable_segmented_timestep_sampling": False}])
def test_draws_are_pure_functions_of_seed_batch_and_slot(settings):
    first = drawn(20, **settings)
    assert (first == drawn(20, **settings)).all()
    assert (first != drawn(20, seed=6, **settings)).any()
