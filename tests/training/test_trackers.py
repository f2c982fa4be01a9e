"""Trackers: tensorboard's events can be read back and start anew where a run resumes; a tracker that is not there is said so."""

import importlib.util

import pytest
from accelerate import PartialState
from PIL import Image

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import ValidationImage
from sdxl_pipeline.training.metrics import StepMetrics
from sdxl_pipeline.training.trackers import Trackers, require_tracker
from tests.lanes import make_spec


def rows(first: int, last: int, loss: float) -> list[StepMetrics]:
    return [StepMetrics(step, loss, 1e-4, None if step == 1 else 0.5, 3.0) for step in range(first, last)]


def test_tensorboard_gets_metrics_and_pictures_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    spec = make_spec(tmp_path, report_to="tensorboard", tracker_run_name="mine")
    trackers = Trackers(spec, "identity", resumed_at=0)
    trackers.log(rows(1, 6, loss=1.0))
    Image.new("RGB", (16, 8), "red").save(tmp_path / "red.png")
    trackers.log_images(
        [ValidationImage(step=5, name="red", prompt="red", path=str(tmp_path / "red.png"), seed=0)]
    )
    trackers.close()
    resumed = Trackers(spec, "identity", resumed_at=3)
    resumed.log(rows(4, 8, loss=2.0))
    resumed.close()

    events = EventAccumulator(str(tmp_path / "run" / "logs" / "mine"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, 1.0 if step < 4 else 2.0) for step in range(1, 8)
    ]
    assert [e.step for e in events.Scalars("train/grad_norm")] == [2, 3, 4, 5, 6, 7]


def test_tensorboard_shows_the_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    trackers = Trackers(make_spec(tmp_path, report_to="tensorboard"), "0123456789abcdef", resumed_at=0)
    Image.new("RGB", (16, 8), "red").save(tmp_path / "red.png")
    trackers.log_images(
        [ValidationImage(step=5, name="red", prompt="red", path=str(tmp_path / "red.png"), seed=0)]
    )
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "0123456789ab"))
    events.Reload()
    (image,) = events.Images("validation/red")
    assert (image.step, image.width, image.height) == (5, 16, 8)


def test_without_trackers_nothing_is_written(tmp_path):
    trackers = Trackers(make_spec(tmp_path), "identity", resumed_at=0)
    trackers.log(rows(1, 3, 1.0))
    trackers.close()
    assert not (tmp_path / "run").exists()


def test_a_missing_tracker_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"report_to asks for wandb.*sdxl-pipeline\[wandb\]"):
        require_tracker("wandb")
