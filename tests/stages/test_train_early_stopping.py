"""Early stopping: the same end after a kill, the best checkpoint retained, and what runs with and without it share."""

import json
import signal
from functools import cache
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.specs import EarlyStop, TrainedLora, TrainingDataset, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.checkpoint.checkpoint_files import run_checkpoints
from sdxl_pipeline.training.checkpoint.finished_runs import finished_run
from sdxl_pipeline.training.checkpoint.resume import resume_run
from sdxl_pipeline.training.checkpoint.run_identity import run_fingerprints
from sdxl_pipeline.training.logging.run_logs import EVAL_LOSS_FILE, read_eval_losses
from tests.support.train_programs import (
    RecordingReporter,
    kill_after_checkpoint,
    losses,
    on_two_processes,
    run_forked,
)
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BEST, STOP = 14, 4, 12

# No loss improves by min_delta, so the first evaluation is the best one and the second after it ends the run.
STOPPING = {
    "early_stopping_patience": 2,
    "early_stopping_min_delta": 100.0,
    "eval_steps_interval": 4,
    "eval_timesteps": 2,
    "num_eval_images": 2,
    "num_probe_images": 3,
    "checkpoint_step_interval": 3,
    "checkpoints_total_limit": 1,
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "lora_dropout": 0.2,
    "caption_dropout_probability": 0.3,
}
OFF = {"early_stopping_patience": None, "early_stopping_min_delta": 0.0}
CONSTANT = {"lr_scheduler": "constant_with_warmup"}


@cache
def datasets_of(folder: Path) -> tuple[TrainingDataset, ...]:
    return (
        make_dataset(folder / "shapes", "shapes"),
        make_dataset(folder / "held", "held", splits=["eval"] * 5),
    )


def spec_of(runs: Path, run: str, **settings: object) -> TrainSpec:
    """Return a run whose folder is in `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    spec = make_spec(runs.parent, *datasets_of(runs.parent), **{**STOPPING, **settings})
    return spec.model_copy(update={"run_dir": str(runs / run)})


def train(spec: TrainSpec, reporter: RecordingReporter | None = None) -> TrainedLora:
    return main(spec, reporter or RecordingReporter(), StopSignal())


def checkpoint_names(manifest: TrainedLora) -> list[str]:
    return sorted(path.name for path in (Path(manifest.run_dir) / "checkpoints").iterdir())


def evaluated_steps(manifest: TrainedLora) -> list[int]:
    return [row.step for row in read_eval_losses(Path(manifest.run_dir) / EVAL_LOSS_FILE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("early")


@pytest.fixture(scope="module")
def stopped(folder: Path) -> TrainedLora:
    """Return a run with a schedule that depends on its length, stopped at step 12 of 14."""
    return train(spec_of(folder / "stopped", "run"))


def assert_stopped(manifest: TrainedLora) -> None:
    eval_losses = dict(manifest.eval_losses)
    assert manifest.stopped_early == EarlyStop(
        step=STOP, best_step=BEST, best_loss=eval_losses[BEST], patience=2
    )
    assert (manifest.steps, manifest.planned_steps) == (STOP, STEPS)
    rows = read_eval_losses(Path(manifest.run_dir) / EVAL_LOSS_FILE)
    assert [row.step for row in rows] == [0, 4, 8, 12]
    probes = [row.probe for row in rows if row.probe is not None]
    assert [len(probe.by_image) for probe in probes] == [3] * 4
    assert not {name for name, _ in rows[0].loss.by_image} & {name for name, _ in probes[0].by_image}
    assert checkpoint_names(manifest) == ["best-00000004", "step-00000012"]


def assert_equal(manifest: TrainedLora, expected: TrainedLora) -> None:
    assert manifest.identity == expected.identity
    assert manifest.weights_sha256 == expected.weights_sha256
    assert losses(manifest) == losses(expected)
    assert manifest.eval_losses == expected.eval_losses


def test_train_killed_and_resumed_stops_at_the_same_step_with_the_same_weights(folder, stopped):
    assert_stopped(stopped)
    spec = spec_of(folder / "killed", "run")
    step = kill_after_checkpoint(spec, signal.SIGKILL, last=6)
    reporter = RecordingReporter()
    resumed = train(spec, reporter)
    assert resumed.resumed_from_step is not None
    assert resumed.resumed_from_step >= step
    assert_stopped(resumed)
    assert_equal(resumed, stopped)
    (line,) = [line for line in reporter.lines if line.startswith("Early stopping")]
    assert line.startswith(
        "Early stopping ends the training at step 12 of 14: none of the last 2 eval losses"
    )
    assert line.endswith("at step 4.")


def test_train_stopped_run_is_finished_and_its_best_checkpoint_can_be_selected(folder, stopped):
    spec = spec_of(folder / "stopped", "run")
    found = finished_run(Path(spec.run_dir), stopped.identity)
    assert found == stopped
    assert train(spec).reused
    best, last = run_checkpoints(stopped)
    assert (best.step, best.samples, best.is_final) == (BEST, BEST, False)
    assert best.epochs == pytest.approx(BEST / 5)
    assert (last.step, last.is_final) == (STOP, True)


def test_resume_run_without_patience_imports_a_stopped_run(folder, stopped):
    spec = spec_of(folder / "stopped", "imported", **OFF)
    reporter = RecordingReporter()
    resume_run(spec, run_fingerprints(spec), reporter)
    (line,) = reporter.lines
    assert "starts at step 12" in line
    assert "continues it exactly (same trajectory)" in line


@pytest.mark.slow
def test_train_without_patience_continues_a_stopped_run_exactly(folder, stopped):
    continued = train(spec_of(folder / "stopped", "continued", **OFF))
    assert continued.resumed_from_step == STOP
    assert continued.ancestor is not None
    assert continued.ancestor.same_trajectory
    assert continued.stopped_early is None
    assert (continued.steps, continued.planned_steps) == (STEPS, STEPS)
    assert_equal(continued, train(spec_of(folder / "plain", "run", **OFF)))


def test_resume_run_with_patience_ignores_checkpoints_of_a_run_that_stops_elsewhere(folder, stopped):
    spec = spec_of(folder / "stopped", "earlier", early_stopping_patience=1)
    reporter = RecordingReporter()
    resume_run(spec, run_fingerprints(spec), reporter)
    assert reporter.lines == []
    assert not (Path(spec.run_dir) / "checkpoints").exists()


@pytest.mark.slow
def test_train_longer_run_with_patience_imports_the_best_checkpoint_too(folder):
    """The shorter run also evaluates its last step, which the longer one does not count."""
    runs = folder / "longer"
    short = train(spec_of(runs, "short", max_train_steps=7, **CONSTANT))
    assert short.stopped_early is None
    assert evaluated_steps(short) == [0, 4, 7]
    assert checkpoint_names(short) == ["best-00000004", "step-00000007"]
    longer = train(spec_of(runs, "longer", **CONSTANT))
    assert longer.resumed_from_step == 7
    assert longer.steps == STOP
    assert checkpoint_names(longer) == ["step-00000004", "step-00000012"]
    alone = train(spec_of(folder / "alone", "run", **CONSTANT))
    assert longer.identity == alone.identity
    assert longer.weights_sha256 == alone.weights_sha256
    assert longer.stopped_early == alone.stopped_early


@pytest.mark.slow
def test_train_with_patience_and_configured_checkpoint_counts_from_there(folder, stopped):
    checkpoint = Path(stopped.run_dir) / "checkpoints" / "step-00000012"
    settings = {"resume_from_checkpoint": str(checkpoint), "max_train_steps": 26}
    spec = spec_of(folder / "configured", "run", **settings)
    manifest = train(spec)
    assert manifest.identity != stopped.identity
    assert manifest.resumed_from_step == STOP
    assert manifest.stopped_early is not None
    assert (manifest.stopped_early.best_step, manifest.steps) == (16, 24)


@pytest.mark.slow
def test_train_stopped_during_the_last_images_generates_them_when_resumed(folder, stopped):
    images = {"validation_disable": False, "validation_on_startup": False}
    stop = StopSignal()

    class StopAtImage(RecordingReporter):
        def _show_image(self, name: str, path: str, caption: str, step: int | None) -> None:
            stop.request()

    spec = spec_of(folder / "images", "run", **images)
    with pytest.raises(StageStopped):
        main(spec, StopAtImage(), stop)
    resumed = train(spec)
    assert resumed.resumed_from_step == STOP
    assert [image.step for image in resumed.validation_images] == [STOP]
    assert_equal(resumed, stopped)


@pytest.mark.slow
def test_train_on_two_processes_stops_both_and_resumes_after_a_kill(folder):
    spec = on_two_processes(spec_of(folder / "two", "run", max_train_steps=STEPS))
    unbroken = run_forked(spec)
    assert_stopped(unbroken)
    killed = spec.model_copy(update={"run_dir": str(folder / "two killed" / "run")})
    Path(killed.run_dir).parent.mkdir()
    kill_after_checkpoint(killed, signal.SIGKILL, last=6)
    resumed = run_forked(killed)
    assert_stopped(resumed)
    assert_equal(resumed, unbroken)


def test_state_json_contains_epochs_and_samples(stopped):
    state = json.loads((Path(stopped.run_dir) / "checkpoints" / "step-00000012" / "state.json").read_bytes())
    assert (state["epochs"], state["samples"]) == (stopped.epochs, stopped.samples)
