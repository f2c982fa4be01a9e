"""Background uploads of checkpoints to the Hub: weights only, independent of the checkpoint, and failures are only reported."""

import shutil
import threading
from pathlib import Path

import pytest

from sdxl_pipeline import hub_client
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.checkpoint.checkpoint_uploads import UPLOADS, CheckpointUploads
from tests.support.hub_server import HubServer
from tests.support.train_programs import RecordingReporter
from tests.support.training_datasets import make_dataset, make_spec

REPO = "someone/cat-lora"
PUSHED = {"push_to_hub": True, "push_checkpoints_to_hub": True, "hub_model_id": REPO}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.adopt_process(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(hub_client, "first_wait_seconds", 0.01)
        yield server


def make_checkpoint(run_dir: Path, name: str) -> Path:
    checkpoint = run_dir / "checkpoints" / name
    (checkpoint / "ema").mkdir(parents=True)
    weights = ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors")
    for file in (
        *weights,
        "trainable.safetensors",
        "optimizer.safetensors",
        "average.safetensors",
        "state.json",
    ):
        (checkpoint / file).write_bytes(f"{name} {file}".encode())
    return checkpoint


def test_add_uploads_only_weights_even_if_the_checkpoint_is_deleted(hub, tmp_path):
    lines: list[str] = []
    uploads = CheckpointUploads(TrainingSettings(**PUSHED), tmp_path / "abc123", lines.append)
    for name in ("step-00000002", "step-00000004"):
        checkpoint = make_checkpoint(tmp_path / "abc123", name)
        uploads.add(checkpoint)
        shutil.rmtree(checkpoint)
    uploads.finish()
    expected = {
        f"checkpoints/abc123/{name}/{file}"
        for name in ("step-00000002", "step-00000004")
        for file in ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors")
    }
    assert set(hub.files(REPO)) - {".gitattributes"} == expected
    assert hub.repos[REPO].private
    assert not (tmp_path / "abc123" / UPLOADS).exists()
    assert sum("is uploaded" in line for line in lines) == 2


def test_add_retries_on_rate_limit_and_reports_failures(hub, tmp_path):
    lines: list[str] = []
    uploads = CheckpointUploads(TrainingSettings(**PUSHED), tmp_path / "abc123", lines.append)
    hub.fail_next(2, status=429, path="/repos/create")
    uploads.add(make_checkpoint(tmp_path / "abc123", "step-00000002"))
    uploads.finish()
    assert sum("rate limit" in line and "Attempt" in line for line in lines) == 2
    assert "checkpoints/abc123/step-00000002/pytorch_lora_weights.safetensors" in hub.files(REPO)
    uploads = CheckpointUploads(TrainingSettings(**PUSHED), tmp_path / "abc123", lines.append)
    hub.fail_next(1, status=403, path="/commit/")
    uploads.add(make_checkpoint(tmp_path / "abc123", "step-00000004"))
    uploads.finish()
    (warning,) = (line for line in lines if line.startswith("WARNING"))
    assert "step-00000004 could not be uploaded" in warning
    assert "HTTP 403" in warning


def test_add_returns_before_the_upload(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(CheckpointUploads, "_upload", lambda *_: released.wait(30))
    uploads = CheckpointUploads(TrainingSettings(**PUSHED), tmp_path / "abc123", lambda _: None)
    for name in ("step-00000002", "step-00000004"):
        uploads.add(make_checkpoint(tmp_path / "abc123", name))  # returns while the first upload is blocked
    assert not released.is_set()
    released.set()
    uploads.finish()


def test_train_with_push_checkpoints_uploads_each_checkpoint(hub, tmp_path):
    dataset = make_dataset(tmp_path / "dataset")
    spec = make_spec(
        tmp_path,
        dataset,
        run="pushed",
        max_train_steps=4,
        checkpoint_step_interval=2,
        checkpoints_total_limit=1,
        **PUSHED,
    )
    listener = RecordingReporter()
    main(spec, listener, StopSignal())
    folders = {path.rpartition("/")[0] for path in hub.files(REPO) if path.startswith("checkpoints/")}
    assert {folder.rpartition("/")[2] for folder in folders} >= {"step-00000002", "step-00000004"}
    assert not any("optimizer" in path or "state.json" in path for path in hub.files(REPO))
    assert any("is uploaded" in line for line in listener.lines)
