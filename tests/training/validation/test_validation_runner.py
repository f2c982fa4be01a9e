"""Holds: a run's looks at itself change no bit of it, are what an evaluation would give, are not repeated, and reach all who watch."""

import json
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
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import LossSummary, TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.run_logs import EVAL_FILE, EvalLog, EvalRow, read_eval_log, read_metrics
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps, read_images
from sdxl_pipeline.training.validation.eval_samples import choose_samples
from sdxl_pipeline.training.validation.validation_runner import ValidationCosts, ValidationSchedule
from tests.support.training_datasets import make_dataset, make_spec

SECRET = "t0ken-nobody-may-see"

# What must not leak into an eval loss, and what looking must not disturb.
RANDOM = {
    "max_train_steps": 6,
    "lora_dropout": 0.3,
    "caption_dropout_probability": 0.5,
    "snr_gamma": 5.0,
    "checkpoint_step_interval": 2,
}
LOOKING = {
    "eval_steps_interval": 4,
    "eval_timesteps": 3,
    "validation_disable": False,
    "validation_step_interval": 3,
    "validation_preview": True,
    "validation_preview_model_name_or_path": "bundled:tiny-taesd",
    "webhook_reporting_interval": 2,
}


class Listener(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.images: list[tuple[str, int | None]] = []
        self.figures: set[str] = set()

    def _show_log(self, message: str) -> None:
        self.lines.append(message)

    def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
        assert Path(path).is_file()
        self.images.append((name, step))

    def _show_metric(self, step: int, values: dict[str, float]) -> None:
        self.figures |= values.keys()


@pytest.fixture
def posts(tmp_path, monkeypatch) -> Iterator[list[dict[str, Any]]]:
    """What a raw webhook gets, whose file is webhooks.json."""
    kept: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/{SECRET}"
    path = tmp_path / "webhooks.json"
    path.write_text(json.dumps({"webhook_type": "raw", "callback_url": address}))
    yield kept
    server.shutdown()
    server.server_close()


def spec_of(folder: Path, run: str, **settings: Any) -> TrainSpec:
    folder = folder / run  # apart from the other runs, whose checkpoints would be taken up
    datasets = (
        make_dataset(folder / "shapes", "shapes", captions=2),
        make_dataset(folder / "held", "held", splits=["eval"] * 5),
        make_dataset(folder / "spare", "spare", splits=["eval"] * 5),
    )
    return make_spec(folder, *datasets, **{**RANDOM, **settings})


def evaluated_afterwards(spec: TrainSpec, manifest: TrainedLora) -> float:
    """The eval loss of the file that was left, loaded by diffusers' own loader."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(spec.base_model.path, torch_dtype=torch.float32)
    weights = Path(manifest.weights_path)
    pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    scheduler = load_noise_scheduler(spec.base_model)
    objective = Objective(scheduler.alphas_cumprod, scheduler.config.prediction_type)
    source, samples = choose_samples(spec.datasets, spec.settings)
    assert source == "eval dataset"
    assert set(samples.images_by_dataset()) == {"held"}
    images = read_images(samples, BatchReader(spec.datasets), latent_scaling_factor(spec.base_model))
    return eval_loss(pipeline.unet, objective, images, eval_timesteps(3), batch_size=1).mean


def test_a_watched_run_is_the_same_run_and_everyone_hears_of_it(tmp_path, posts):
    alone = main(spec_of(tmp_path, "alone"), Reporter(), StopSignal())
    webhook = {"webhook_config": str(tmp_path / "webhooks.json"), "eval_dataset_id": "held"}
    spec, listener = spec_of(tmp_path, "watched", **LOOKING, **webhook), Listener()
    watched = main(spec, listener, StopSignal())

    assert watched.identity == alone.identity
    assert watched.weights_sha256 == alone.weights_sha256
    assert alone.eval_losses == ()

    assert [step for step, _ in watched.eval_losses] == [0, 4, 6]
    base, _, final = (loss for _, loss in watched.eval_losses)
    assert final == pytest.approx(evaluated_afterwards(spec, watched), rel=1e-6)
    assert final < base

    forming = {("circle, forming", step) for step in (0, 3, 6)}
    images = {("circle", step) for step in (0, 3, 6)}
    assert set(listener.images) == forming | images
    wanted = {"loss", "lr", "grad_norm", "steps_per_second", "samples_per_second", "eta_seconds", "eval/loss"}
    assert wanted <= listener.figures
    row = read_metrics(Path(watched.metrics_path))[-1]
    assert row.steps_per_second is not None
    assert row.samples_per_second == pytest.approx(2 * row.steps_per_second)
    assert 0 < row.eta_seconds < watched.seconds  # the last look is to come

    kinds = [post["message_type"] for post in posts]
    assert kinds[0] == "training.started"
    assert kinds[-1] == "training.finished"
    # a preview takes the place of one that still waits
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

    said = "\n".join(listener.lines) + watched.model_dump_json() + spec.model_dump_json() + repr(spec)
    assert SECRET not in said
    for path in Path(spec.run_dir).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_the_time_to_the_end_counts_the_looks_to_come(tmp_path):
    settings = {
        "eval_steps_interval": 5,
        "validation_disable": False,
        "validation_step_interval": 10,
        "validation_epoch_interval": 1,
    }
    times = ValidationSchedule(make_spec(tmp_path, **settings), 23, epochs_at=lambda step: step / 7)
    now = [0.0]
    costs = ValidationCosts(times, clock=lambda: now[0])
    assert costs.to_come(0) == 0.0  # nothing is known yet

    def take(kind: str, seconds: float) -> None:
        with costs.timed(kind):
            now[0] += seconds

    take("eval_loss", 4.0)  # after steps 0, 5, 10, 15, 20, 23
    assert costs.to_come(0) == 6 * 4.0
    assert costs.to_come(1) == 5 * 4.0
    for seconds in (100.0, 60.0):  # after steps 0, 7, 10, 14, 20, 21, 23
        take("images", seconds)
    assert costs.to_come(10) == 4 * 4.0 + 5 * 80.0
    assert costs.to_come(11) == 3 * 4.0 + 4 * 80.0
    assert costs.to_come(23) == 4.0 + 80.0
    with suppress(StageStopped), costs.timed("eval_loss"):
        raise StageStopped  # at once, and yet it is not counted
    assert costs.to_come(23) == 4.0 + 80.0


def test_an_interrupted_run_repeats_no_look(tmp_path, posts):
    spec = spec_of(tmp_path, "stopped", **LOOKING, webhook_config=str(tmp_path / "webhooks.json"))

    class StopAtFour(Listener):
        def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
            super()._show_image(name, path, caption, step)
            if step == 3:
                stop.request()

    stop = StopSignal()
    with pytest.raises(StageStopped):
        main(spec, StopAtFour(), stop)
    assert [post["message_type"] for post in posts][-1] == "training.stopped"
    listener = Listener()
    resumed = main(spec, listener, StopSignal())
    assert resumed.resumed_from_step == 3
    assert [row.step for row in read_eval_log(Path(spec.run_dir))] == [0, 4, 6]
    assert [image.step for image in resumed.validation_images] == [0, 3, 6]
    assert ("circle", 0) not in listener.images
    assert (
        resumed.weights_sha256 == main(spec_of(tmp_path, "unbroken"), Reporter(), StopSignal()).weights_sha256
    )


def test_the_log_of_eval_losses_forgets_what_will_be_taken_again(tmp_path):
    log = EvalLog(tmp_path, resumed_at=0)
    assert not (tmp_path / EVAL_FILE).exists()
    rows = [EvalRow(step=step, loss=LossSummary(mean=0.1, by_timestep=((500, 0.1),))) for step in (0, 4, 8)]
    for row in rows:
        log.add(row)
    with (tmp_path / EVAL_FILE).open("a") as file:
        file.write('{"step": 12, "lo')
    assert EvalLog(tmp_path, resumed_at=6).rows == rows[:2]
    assert read_eval_log(tmp_path) == rows[:2]


def test_what_ends_a_run_is_told_and_only_words_made_for_users(tmp_path, posts):
    PartialState(cpu=True)
    spec = spec_of(tmp_path, "failing", webhook_config=str(tmp_path / "webhooks.json"))
    for error in (UserError("lower learning_rate"), RuntimeError("a private path")):
        watch = RunObserver(spec, "0" * 64, Reporter())
        watch.begin(resumed_at=4, total_steps=6)
        with pytest.raises(type(error)), watch:
            raise error
    told = [(post["message_type"], post["level"], post["message"]) for post in posts]
    goes_on = ("training.started", "info", "The training goes on from step 4: 6 steps.")
    assert told == [
        goes_on,
        ("training.failed", "error", "The training failed: lower learning_rate"),
        goes_on,
        ("training.failed", "error", "The training failed: RuntimeError"),
    ]


def test_a_failure_of_the_setup_is_told_and_ends_the_sending(tmp_path, posts, monkeypatch):
    webhook = {"webhook_config": str(tmp_path / "webhooks.json"), "report_to": "tensorboard"}
    threads = threading.active_count()
    monkeypatch.setattr("sdxl_pipeline.training.trainer.build_trainable", out_of_memory)
    with pytest.raises(MemoryError):
        main(spec_of(tmp_path, "large", **webhook), Reporter(), StopSignal())
    unseen = {**LOOKING, "validation_preview_model_name_or_path": "/nowhere"}
    monkeypatch.undo()
    with pytest.raises(UserError, match="which is not a folder"):
        main(spec_of(tmp_path, "run", **unseen, **webhook), Reporter(), StopSignal())
    memory, folder = posts
    assert (memory["message_type"], memory["step"]) == ("training.failed", None)
    assert memory["message"] == "The training failed: MemoryError"
    assert "validation_preview" in folder["message"]
    assert threading.active_count() == threads


def out_of_memory(spec: TrainSpec) -> None:
    raise MemoryError("a private path")


def test_what_looking_needs_is_missed_at_the_start(tmp_path):
    missing = spec_of(tmp_path, "run", **{**LOOKING, "validation_preview_model_name_or_path": "/nowhere"})
    with pytest.raises(UserError, match="which is not a folder"):
        main(missing, Reporter(), StopSignal())
    nobody = spec_of(tmp_path, "run", **LOOKING, eval_dataset_id="shapes")
    with pytest.raises(UserError, match="eval_dataset_id: 'shapes' has no images to evaluate on"):
        main(nobody, Reporter(), StopSignal())
    broken = spec_of(tmp_path, "run", webhook_config=str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match=r"absent\.json"):
        main(broken, Reporter(), StopSignal())
