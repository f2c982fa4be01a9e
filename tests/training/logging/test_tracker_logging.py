"""Each tracker stores metrics and images, continues the run on resume, and raises UserError when it is not available."""

import importlib.util
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from sdxl_pipeline.runtime.specs import TrainSpec, ValidationImage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from sdxl_pipeline.training.logging.run_logs import StepMetrics
from sdxl_pipeline.training.logging.tracker_logging import Trackers, require_tracker
from sdxl_pipeline.training.validation.previews import Preview
from tests.support.training_datasets import make_spec


def rows(first: int, last: int, loss: float) -> list[StepMetrics]:
    return [
        StepMetrics(step, loss, 1e-4, None if step == 1 else 0.5, 4.0, 2.0, 7.0)
        for step in range(first, last)
    ]


def build_trackers(spec: TrainSpec, identity: str) -> Trackers:
    config = settings_affecting_weights(spec.settings)
    return Trackers(spec.settings, spec.project, identity, Path(spec.run_dir), config)


def start_trackers(spec: TrainSpec, identity: str, resumed_at: int) -> Trackers:
    trackers = build_trackers(spec, identity)
    trackers.start(resumed_at)
    return trackers


def test_tensorboard_resumed_run_continues_metrics_from_checkpoint(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    spec = make_spec(tmp_path, report_to="tensorboard", tracker_run_name="mine")
    trackers = start_trackers(spec, "identity", 0)
    trackers.log_steps(rows(1, 6, loss=1.0))
    Image.new("RGB", (16, 8), "red").save(tmp_path / "red.png")
    trackers.log_images(
        [ValidationImage(step=5, name="red", prompt="red", path=str(tmp_path / "red.png"), seed=0)]
    )
    trackers.close()
    resumed = start_trackers(spec, "identity", 3)
    resumed.log_steps(rows(4, 8, loss=2.0))
    resumed.close()

    events = EventAccumulator(str(tmp_path / "run" / "logs" / "mine-identity"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, 1.0 if step < 4 else 2.0) for step in range(1, 8)
    ]
    assert [e.step for e in events.Scalars("train/grad_norm")] == [2, 3, 4, 5, 6, 7]


def test_tensorboard_log_images_stores_image(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    trackers = start_trackers(make_spec(tmp_path, report_to="tensorboard"), "0123456789abcdef", 0)
    Image.new("RGB", (16, 8), "red").save(tmp_path / "red.png")
    trackers.log_images(
        [ValidationImage(step=5, name="red", prompt="red", path=str(tmp_path / "red.png"), seed=0)]
    )
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "0123456789ab"))
    events.Reload()
    (image,) = events.Images("validation/red")
    assert (image.step, image.width, image.height) == (5, 16, 8)


@pytest.fixture
def preview(tmp_path) -> Preview:
    Image.new("RGB", (16, 8), "blue").save(tmp_path / "preview.jpg")
    return Preview("red", "a red thing", str(tmp_path / "preview.jpg"), 5, 2, 20)


def test_tensorboard_log_metrics_and_log_preview_store_scalars_and_image(tmp_path, preview):
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    trackers = start_trackers(make_spec(tmp_path, report_to="tensorboard"), "0123456789abcdef", 0)
    trackers.log_metrics(5, {"eval/loss": 0.25, "train/ema_decay": 0.75})
    trackers.log_preview(preview)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "0123456789ab"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(5, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("train/ema_decay")] == [(5, 0.75)]
    assert [e.step for e in events.Images("preview/red/02")] == [5]


def test_wandb_offline_stores_run_under_identity(tmp_path, monkeypatch, preview):
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_SILENT", "true"),
        ("WANDB_CONFIG_DIR", str(tmp_path)),
    ):
        monkeypatch.setenv(name, value)
    PartialState(cpu=True)
    spec = make_spec(tmp_path, report_to="wandb", tracker_run_name="mine", tracker_project_name="kittens")
    Path(spec.run_dir).mkdir()
    trackers = start_trackers(spec, "0123456789abcdef", 0)
    import wandb

    run = wandb.run
    assert run is not None
    assert (run.project, run.name, run.id) == ("kittens", "mine", "0123456789abcdef")
    trackers.log_steps(rows(1, 4, loss=0.5))
    trackers.log_preview(preview)
    assert run.summary["train/loss"] == 0.5
    assert run.summary["train/steps_per_second"] == 2.0
    assert (run.config["lora_rank"], "output_dir" in run.config) == (2, False)
    assert run.step == 5
    trackers.close()
    (folder,) = (Path(spec.run_dir) / "wandb").glob("offline-run-*-0123456789abcdef")
    assert list(folder.glob("*.wandb"))
    assert [path.suffix for path in (folder / "files" / "media").rglob("*.*")] == [".png"]


def test_trackio_resumed_run_continues_local_run(tmp_path, monkeypatch, preview):
    trackio = pytest.importorskip("trackio", reason="needs the extra `trackio`")
    for module in (trackio.sqlite_storage, trackio.utils, trackio.media.media, trackio.run):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
        monkeypatch.setattr(module, "MEDIA_DIR", tmp_path / "trackio" / "media", raising=False)
    PartialState(cpu=True)
    spec = make_spec(tmp_path, report_to="trackio", tracker_run_name="mine")
    for first, last in ((1, 4), (4, 6)):
        trackers = start_trackers(spec, "0123456789abcdef", first - 1)
        trackers.log_steps(rows(first, last, loss=0.5))
        if first == 4:
            trackers.log_preview(preview)
        trackers.close()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        steps = connection.execute("select distinct run_name, step from metrics order by step").fetchall()
    assert steps == [("mine-0123456789ab", step) for step in range(1, 6)]
    assert list((tmp_path / "trackio" / "media").rglob("*.png"))


def test_trackers_none_configured_writes_nothing(tmp_path):
    trackers = start_trackers(make_spec(tmp_path), "identity", 0)
    trackers.log_steps(rows(1, 3, 1.0))
    trackers.close()
    assert not (tmp_path / "run").exists()


def test_require_tracker_missing_package_raises_with_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report_to has wandb.*sdxl-pipeline\[wandb\]"):
        require_tracker("wandb")


@pytest.fixture
def wandb_without_a_key(tmp_path, monkeypatch) -> Iterator[None]:
    """Isolate wandb from any login of this machine."""
    wandb = pytest.importorskip("wandb", reason="needs the extra `wandb`")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


def test_trackers_wandb_without_key_raises(wandb_without_a_key, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        build_trackers(make_spec(tmp_path, report_to="wandb"), "identity")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="wandb, which cannot be started"):
        require_tracker("wandb")


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_require_tracker_wandb_offline_needs_no_key(wandb_without_a_key, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    require_tracker("wandb")


# one address each, because wandb caches keys by address; no server is contacted
@pytest.mark.parametrize(("location", "host"), [("environment", "127.0.0.1:9"), ("netrc", "127.0.0.1:7")])
def test_require_tracker_wandb_key_in_environment_or_netrc_passes(
    wandb_without_a_key, tmp_path, monkeypatch, location, host
):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    key = "0123456789" * 4
    if location == "netrc":
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
        (tmp_path / "netrc").chmod(0o600)
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)
    require_tracker("wandb")


def test_trackers_start_failure_raises_without_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-key")

    def fail(*_):
        raise PermissionError("s3cret-key may not write at https://me:pass@example.com/logs?key=1")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    trackers = build_trackers(make_spec(tmp_path, report_to="tensorboard"), "identity")
    with pytest.raises(UserError, match=r"tensorboard, which cannot be started \(PermissionError") as raised:
        trackers.start(0)
    trackers.close()
    for secret in ("s3cret-key", "pass", "key=1"):
        assert secret not in str(raised.value)
