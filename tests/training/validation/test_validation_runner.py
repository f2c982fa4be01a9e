"""Validation does not change the training, equals the evaluation, is not repeated on resume, and reaches all observers."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline

from sdxl_pipeline.models.components import latent_scaling_factor, load_noise_scheduler
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EarlyStop, TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.runtime.webhook import Origin
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.run_logs import EVAL_LOSS_FILE, read_eval_losses, read_metrics
from sdxl_pipeline.training.logging.tracker_logging import Trackers
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps, load_eval_images
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples
from sdxl_pipeline.training.validation.validation_runner import ValidationSchedule, ValidationTimer
from tests.support.training_datasets import make_dataset, make_spec

SECRET = "t0ken-nobody-may-see"

# Sources of randomness and weighting: no part of the eval loss, and not affected by validation.
RANDOM = {
    "max_train_steps": 6,
    "lora_dropout": 0.3,
    "caption_dropout_probability": 0.5,
    "snr_gamma": 5.0,
    "checkpoint_step_interval": 2,
}
VALIDATION = {
    "eval_steps_interval": 4,
    "eval_timesteps": 3,
    "validation_disable": False,
    "validation_step_interval": 3,
    "validation_preview": True,
    "validation_preview_model_name_or_path": "bundled:tiny-taesd",
    "webhook_reporting_interval": 2,
}


class RecordingReporter(Reporter):
    """Records log lines, images and metric names."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.images: list[tuple[str, int | None]] = []
        self.metrics_seen: set[str] = set()

    def _show_log(self, message: str) -> None:
        self.lines.append(message)

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        assert Path(path).is_file()
        self.images.append((name, step))

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        self.metrics_seen |= values.keys()


@pytest.fixture
def posts(tmp_path, monkeypatch) -> Iterator[list[dict[str, Any]]]:
    """Return the messages that the raw webhook of webhooks.json receives."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/{SECRET}"
    path = tmp_path / "webhooks.json"
    path.write_text(json.dumps({"webhook_type": "raw", "callback_url": address}))
    yield received
    server.shutdown()
    server.server_close()


def spec_of(folder: Path, run: str, **settings: Any) -> TrainSpec:
    folder = folder / run  # its own folder, so that no checkpoint of another run is used
    datasets = (
        make_dataset(folder / "shapes", "shapes", captions=2),
        make_dataset(folder / "held", "held", splits=["eval"] * 5),
        make_dataset(folder / "spare", "spare", splits=["eval"] * 5),
    )
    return make_spec(folder, *datasets, **{**RANDOM, **settings})


def evaluate_weights_file(spec: TrainSpec, manifest: TrainedLora) -> float:
    """Return the eval loss of the weights file, loaded with diffusers' own loader."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(spec.base_model.path, torch_dtype=torch.float32)
    weights = Path(manifest.weights_path)
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    scheduler = load_noise_scheduler(spec.base_model)
    objective = Objective.plain(scheduler)
    source, samples = select_eval_samples(spec.datasets, spec.settings, "original")
    assert source == "eval dataset"
    assert set(samples.images_by_dataset()) == {"held"}
    images = load_eval_images(samples, BatchReader(spec.datasets), latent_scaling_factor(spec.base_model))
    return eval_loss(pipeline.unet, objective, images, eval_timesteps(3), batch_size=1).mean


def test_train_with_validation_has_same_weights_and_notifies_all_observers(tmp_path, posts):
    plain = main(spec_of(tmp_path, "plain"), Reporter(), StopSignal())
    webhook = {"webhook_config": str(tmp_path / "webhooks.json"), "eval_dataset_id": "held"}
    spec, reporter = spec_of(tmp_path, "validated", **VALIDATION, **webhook), RecordingReporter()
    validated = main(spec, reporter, StopSignal())

    assert validated.identity == plain.identity
    assert validated.weights_sha256 == plain.weights_sha256
    assert plain.eval_losses == ()

    assert [step for step, _ in validated.eval_losses] == [0, 4, 6]
    base, _, final = (loss for _, loss in validated.eval_losses)
    assert final == pytest.approx(evaluate_weights_file(spec, validated), rel=1e-6)
    assert final < base

    previews = {("circle (preview)", step) for step in (0, 3, 6)}
    images = {("circle", step) for step in (0, 3, 6)}
    assert set(reporter.images) == previews | images
    expected = {
        "loss",
        "lr",
        "grad_norm",
        "steps_per_second",
        "samples_per_second",
        "eta_seconds",
        "eval/loss",
    }
    assert expected <= reporter.metrics_seen
    row = read_metrics(Path(validated.metrics_path))[-1]
    assert row.steps_per_second is not None
    assert row.samples_per_second == pytest.approx(2 * row.steps_per_second)
    assert 0 < row.eta_seconds < validated.seconds  # the last validation remains

    kinds = [post["message_type"] for post in posts]
    assert kinds[0] == "training.started"
    assert kinds[-1] == "training.finished"
    # a preview replaces one that is still queued
    assert 1 <= kinds.count("validation.preview") <= 6
    assert {kind: kinds.count(kind) for kind in kinds if kind != "validation.preview"} == {
        "training.started": 1,
        "eval.loss": 3,
        "validation.images": 3,
        "training.progress": 3,
        "training.finished": 1,
    }
    progress = [post for post in posts if post["message_type"] == "training.progress"]
    assert [post["step"] for post in progress] == [2, 4, 6]
    assert progress[0]["values"].keys() >= {"loss", "lr", "grad_norm"}
    assert all(post["images"] for post in posts if post["message_type"].startswith("validation"))

    output = "\n".join(reporter.lines) + validated.model_dump_json() + spec.model_dump_json() + repr(spec)
    assert SECRET not in output
    for path in Path(spec.run_dir).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_validation_timer_remaining_seconds_by_kind(tmp_path):
    settings = {
        "eval_steps_interval": 5,
        "validation_disable": False,
        "validation_step_interval": 10,
        "validation_epoch_interval": 1,
    }
    spec = make_spec(tmp_path, **settings)
    schedule = ValidationSchedule(
        spec.settings, spec.settings, bool(spec.prompts), 23, epochs_at=lambda step: step / 7
    )
    now = [0.0]
    timer = ValidationTimer(schedule, clock=lambda: now[0])
    assert timer.remaining_seconds(0) == 0.0  # nothing measured yet

    def run(kind: str, seconds: float) -> None:
        with timer.measure(kind):
            now[0] += seconds

    run("eval_loss", 4.0)  # after steps 0, 5, 10, 15, 20, 23
    assert timer.remaining_seconds(0) == 6 * 4.0
    assert timer.remaining_seconds(1) == 5 * 4.0
    for seconds in (100.0, 60.0):  # after steps 0, 7, 10, 14, 20, 21, 23
        run("images", seconds)
    assert timer.remaining_seconds(10) == 4 * 4.0 + 5 * 80.0
    assert timer.remaining_seconds(11) == 3 * 4.0 + 4 * 80.0
    assert timer.remaining_seconds(23) == 4.0 + 80.0
    with suppress(StageStopped), timer.measure("eval_loss"):
        raise StageStopped  # not counted
    assert timer.remaining_seconds(23) == 4.0 + 80.0


@pytest.mark.slow
def test_train_resumed_repeats_no_validation(tmp_path, posts):
    spec = spec_of(tmp_path, "stopped", **VALIDATION, webhook_config=str(tmp_path / "webhooks.json"))

    class StopAtImageOfStepThree(RecordingReporter):
        def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
            super()._show_image(name, path, caption, step)
            if step == 3:
                stop.request()

    stop = StopSignal()
    with pytest.raises(StageStopped):
        main(spec, StopAtImageOfStepThree(), stop)
    assert [post["message_type"] for post in posts][-1] == "training.stopped"
    reporter = RecordingReporter()
    resumed = main(spec, reporter, StopSignal())
    assert resumed.resumed_from_step == 3
    assert [row.step for row in read_eval_losses(Path(spec.run_dir) / EVAL_LOSS_FILE)] == [0, 4, 6]
    assert [image.step for image in resumed.validation_images] == [0, 3, 6]
    assert ("circle", 0) not in reporter.images
    assert (
        resumed.weights_sha256 == main(spec_of(tmp_path, "unbroken"), Reporter(), StopSignal()).weights_sha256
    )


def test_run_observer_error_sends_message_of_user_errors_only(tmp_path, posts):
    PartialState(cpu=True)
    spec = spec_of(tmp_path, "failing", webhook_config=str(tmp_path / "webhooks.json"))
    for error in (UserError("lower learning_rate"), RuntimeError("a private path")):
        trackers = Trackers(spec.settings, spec.project, "0" * 64, Path(spec.run_dir), {})
        observer = RunObserver(spec.settings, Origin(spec.project, "0" * 12), trackers, Reporter())
        observer.on_train_begin(resumed_at=4, total_steps=6)
        with pytest.raises(type(error)), observer:
            raise error
    sent = [(post["message_type"], post["level"], post["message"]) for post in posts]
    started = ("training.started", "info", "The training resumes from step 4: 6 steps.")
    assert sent == [
        started,
        ("training.failed", "error", "The training failed: lower learning_rate"),
        started,
        ("training.failed", "error", "The training failed: RuntimeError"),
    ]


def test_run_observer_early_stop_sends_message_without_losses_that_are_not_finite(tmp_path, posts):
    PartialState(cpu=True)
    spec = spec_of(tmp_path, "stopped", webhook_config=str(tmp_path / "webhooks.json"))
    trackers = Trackers(spec.settings, spec.project, "0" * 64, Path(spec.run_dir), {})
    reporter = RecordingReporter()
    with RunObserver(spec.settings, Origin(spec.project, "0" * 12), trackers, reporter) as observer:
        observer.on_eval_loss(10, LossSummary(mean=math.nan, by_timestep=()), None)
        observer.on_early_stop(EarlyStop(step=30, best_step=20, best_loss=0.25, patience=1), 60)
    text = "Early stopping ends the training at step 30 of 60: none of the last 1 eval losses is better than 0.25000 at step 20."
    assert text in reporter.lines
    assert [(post["message_type"], post["step"], post["values"]) for post in posts] == [
        ("eval.loss", 10, {}),
        ("training.stopped_early", 30, {"eval/best_loss": 0.25, "eval/best_step": 20.0}),
    ]
    assert posts[1]["message"] == text


def test_train_setup_failure_sends_error_and_stops_webhook_threads(tmp_path, posts, monkeypatch):
    webhook = {"webhook_config": str(tmp_path / "webhooks.json"), "report_to": "tensorboard"}
    threads = threading.active_count()
    monkeypatch.setattr("sdxl_pipeline.training.trainer.build_trainable", raise_out_of_memory)
    with pytest.raises(MemoryError):
        main(spec_of(tmp_path, "large", **webhook), Reporter(), StopSignal())
    missing = {**VALIDATION, "validation_preview_model_name_or_path": "/nowhere"}
    monkeypatch.undo()
    with pytest.raises(UserError, match="which is not a folder"):
        main(spec_of(tmp_path, "run", **missing, **webhook), Reporter(), StopSignal())
    memory, folder = posts
    assert (memory["message_type"], memory["step"]) == ("training.failed", None)
    assert memory["message"] == "The training failed: MemoryError"
    assert "validation_preview" in folder["message"]
    assert threading.active_count() == threads


def raise_out_of_memory(spec: TrainSpec) -> None:
    raise MemoryError("a private path")


def test_train_missing_validation_input_raises_before_training(tmp_path):
    missing = spec_of(tmp_path, "run", **{**VALIDATION, "validation_preview_model_name_or_path": "/nowhere"})
    with pytest.raises(UserError, match="which is not a folder"):
        main(missing, Reporter(), StopSignal())
    no_eval_images = spec_of(tmp_path, "run", **VALIDATION, eval_dataset_id="shapes")
    with pytest.raises(UserError, match="eval_dataset_id: 'shapes' has no images to evaluate on"):
        main(no_eval_images, Reporter(), StopSignal())
    broken = spec_of(tmp_path, "run", webhook_config=str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match=r"absent\.json"):
        main(broken, Reporter(), StopSignal())
