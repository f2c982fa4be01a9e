"""Holds after which steps a run saves: by steps, by epochs, rolling, and always at its end."""

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import checkpoint_due

TOTAL = 12


def saved(kind: str, **settings: object) -> list[int]:
    chosen = TrainingSettings(**{"checkpoint_step_interval": 0, **settings})
    # epochs of two and a half steps
    return [
        step
        for step in range(1, TOTAL + 1)
        if checkpoint_due(chosen, step, TOTAL, lambda step: step / 2.5) == kind
    ]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [12]),
        ({"checkpoint_step_interval": 5}, [5, 10, 12]),
        ({"checkpoint_epoch_interval": 1}, [3, 5, 8, 10, 12]),
        ({"checkpoint_epoch_interval": 2}, [5, 10, 12]),
        ({"checkpoint_epoch_interval": "0"}, [12]),
        ({"checkpoint_epoch_interval": 4, "checkpoint_step_interval": 4}, [4, 8, 10, 12]),
    ],
)
def test_by_steps_and_by_epochs(settings, steps):
    assert saved("step", **settings) == steps
    assert saved("rolling", **settings) == []


def test_a_rolling_one_gives_way_to_one_that_stays():
    settings = {"checkpointing_rolling_steps": 2, "checkpoint_step_interval": 6}
    assert saved("rolling", **settings) == [2, 4, 8, 10]
    assert saved("step", **settings) == [6, 12]
