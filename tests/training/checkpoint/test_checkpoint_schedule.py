"""Checkpoint schedule: by steps, by epochs, rolling, and always at the end of the run."""

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import checkpoint_due

TOTAL = 12


def saved_steps(kind: str, **settings: object) -> list[int]:
    training_settings = TrainingSettings(**{"checkpoint_step_interval": 0, **settings})
    # an epoch takes 2.5 steps
    return [
        step
        for step in range(1, TOTAL + 1)
        if checkpoint_due(training_settings, step, TOTAL, lambda step: step / 2.5) == kind
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
def test_checkpoint_due_by_steps_and_epochs_returns_step(settings, steps):
    assert saved_steps("step", **settings) == steps
    assert saved_steps("rolling", **settings) == []


def test_checkpoint_due_by_both_kinds_prefers_step():
    settings = {"checkpointing_rolling_steps": 2, "checkpoint_step_interval": 6}
    assert saved_steps("rolling", **settings) == [2, 4, 8, 10]
    assert saved_steps("step", **settings) == [6, 12]
