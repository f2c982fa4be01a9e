"""The tracker resource stands below config.json and refuses what cannot work before a training starts."""

import dagster as dg
import pytest

from resources import trackers
from resources.trackers import TrackerResource
from sdxl_pipeline.config.schema.training import TrainingSettings

STEPS = {"max_train_steps": 10}


def test_it_fills_in_what_the_project_leaves_open():
    settings = TrackerResource(report_to=["tensorboard"], logging_dir="/logs").apply(
        TrainingSettings(**STEPS)
    )
    assert settings.report_to == ("tensorboard",)
    assert settings.logging_dir == "/logs"


def test_what_the_project_says_stands():
    own = TrainingSettings(**STEPS, report_to="none", logging_dir="mine")
    settings = TrackerResource(report_to=["tensorboard"], logging_dir="/logs").apply(own)
    assert settings.report_to == ()
    assert settings.logging_dir == "mine"


def test_without_fields_nothing_changes():
    own = TrainingSettings(**STEPS, report_to="tensorboard")
    assert TrackerResource().apply(own) == own
    assert TrackerResource().environment() == {}


def test_an_unknown_tracker_is_refused():
    with pytest.raises(dg.Failure, match="no tracker 'tensorbored'; write tensorboard, wandb"):
        TrackerResource(report_to=["tensorbored"]).apply(TrainingSettings(**STEPS))


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(dg.Failure, match=r"wandb is not installed.*sdxl-pipeline\[wandb\]"):
        TrackerResource().apply(TrainingSettings(**STEPS, report_to="wandb"))


def test_wandbs_mode_goes_to_the_training_by_its_environment():
    assert TrackerResource(wandb_mode="offline").environment() == {"WANDB_MODE": "offline"}
    with pytest.raises(dg.Failure, match="wandb_mode is 'of'; write one of online, offline, disabled"):
        TrackerResource(wandb_mode="of").environment()
