"""The tracker resource: config.json takes precedence, and unusable trackers fail before the training."""

import dagster as dg
import pytest

from resources import trackers
from resources.trackers import TrackerResource
from sdxl_pipeline.config.schema.training import TrainingSettings

STEPS = {"max_train_steps": 10}


def test_apply_unset_settings_get_the_resource_values():
    settings = TrackerResource(report_to=["tensorboard"], logging_dir="/logs").apply(
        TrainingSettings(**STEPS)
    )
    assert settings.report_to == ("tensorboard",)
    assert settings.logging_dir == "/logs"


def test_apply_project_settings_are_not_replaced():
    settings = TrainingSettings(**STEPS, report_to="none", logging_dir="mine")
    settings = TrackerResource(report_to=["tensorboard"], logging_dir="/logs").apply(settings)
    assert settings.report_to == ()
    assert settings.logging_dir == "mine"


def test_apply_without_fields_changes_nothing():
    settings = TrainingSettings(**STEPS, report_to="tensorboard")
    assert TrackerResource().apply(settings) == settings
    assert TrackerResource().environment() == {}


def test_apply_unknown_tracker_fails():
    with pytest.raises(dg.Failure, match="unknown tracker 'tensorbored'; write tensorboard, wandb"):
        TrackerResource(report_to=["tensorbored"]).apply(TrainingSettings(**STEPS))


def test_apply_tracker_not_installed_fails_with_its_extra(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(dg.Failure, match=r"wandb is not installed.*sdxl-pipeline\[wandb\]"):
        TrackerResource().apply(TrainingSettings(**STEPS, report_to="wandb"))


def test_environment_has_the_wandb_mode():
    assert TrackerResource(wandb_mode="offline").environment() == {"WANDB_MODE": "offline"}
    with pytest.raises(dg.Failure, match="wandb_mode is 'of'; write one of online, offline, disabled"):
        TrackerResource(wandb_mode="of").environment()
