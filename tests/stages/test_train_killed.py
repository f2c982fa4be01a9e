"""A run killed at a random step and resumed has the same files as an uninterrupted one, for any optimizer and number of processes."""

import signal
from pathlib import Path

import pytest

from sdxl_pipeline.release.formats.kohya_file import kohya_file_name
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from tests.support.train_programs import (
    TWO_PROCESSES,
    RecordingReporter,
    kill_after_checkpoint,
    kill_launcher_after_checkpoint,
    losses,
    on_two_processes,
    run,
    run_forked,
    with_settings,
)
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LAST = 20, 15

# Everything that could make a resumed run differ: adapter and caption dropout, several captions, posterior sampling, accumulation, a
# schedule, an EMA, epochs that end within a step.
STOCHASTIC = {
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,
    "caption_dropout_probability": 0.3,
    "checkpoint_step_interval": 3,
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "use_ema": True,
}
WITH_IMAGES = {"validation_disable": False, "validation_step_interval": 10, "ema_validation": "ema_only"}
LION = {"optimizer": "optimi-lion", "learning_rate": 1e-4}
OTHER_OPTIMIZERS = [
    "adamw_bf16",
    "prodigy",
    "adamw_schedulefree",
    "adafactor",
    "optimi-stableadamw",
    "ao-adamw8bit",
]


def stochastic_spec(folder: Path, **settings: object) -> TrainSpec:
    return make_spec(
        folder, make_dataset(folder / "dataset", captions=3), run="unbroken", **{**STOCHASTIC, **settings}
    )


def files(manifest: TrainedLora) -> dict[str, bytes]:
    """Return the weights, their EMA and the last checkpoint as bytes; without the header for the file whose header has a date."""
    folder = Path(manifest.run_dir)
    weights = [*folder.glob("*.safetensors"), *folder.glob("ema/*")]
    weights += (folder / "checkpoints" / f"step-{STEPS:08d}").rglob("*.safetensors")
    dated = kohya_file_name("small")
    return {
        str(path.relative_to(folder)): path.read_bytes()[header_bytes(path) if path.name == dated else 0 :]
        for path in sorted(weights)
    }


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def assert_equal(resumed: TrainedLora, unbroken: TrainedLora, step: int) -> None:
    assert resumed.resumed_from_step is not None
    assert step <= resumed.resumed_from_step < STEPS
    assert resumed.identity == unbroken.identity
    expected = files(unbroken)
    assert len(expected) >= 4
    assert files(resumed) == expected
    assert losses(resumed) == losses(unbroken)


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        pytest.param(signal.SIGTERM, {}, id="SIGTERM-adamw", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, LION, id="SIGKILL-optimi-lion"),
    ],
)
def test_train_killed_and_resumed_equals_unbroken_run(tmp_path, number, settings):
    spec = stochastic_spec(tmp_path, **settings)
    unbroken = main(spec, RecordingReporter(), StopSignal())
    # with validation images, which the unbroken run does not generate and which must not change the weights
    spec = with_settings(spec, "killed", **WITH_IMAGES)
    step = kill_after_checkpoint(spec, number, LAST)
    resumed = main(spec, RecordingReporter(), StopSignal())
    assert_equal(resumed, unbroken, step)
    assert sorted({image.step for image in resumed.validation_images}) == [0, 10, 20]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("optimizer", OTHER_OPTIMIZERS)
def test_train_killed_and_resumed_with_any_optimizer_equals_unbroken_run(tmp_path, optimizer, number):
    spec = stochastic_spec(tmp_path, optimizer=optimizer, use_ema=optimizer != "adamw_schedulefree")
    unbroken = main(spec, RecordingReporter(), StopSignal())
    spec = with_settings(spec, "killed")
    step = kill_after_checkpoint(spec, number, LAST)
    assert_equal(main(spec, RecordingReporter(), StopSignal()), unbroken, step)


@pytest.mark.slow
def test_train_killed_and_resumed_on_two_processes_equals_unbroken_run(tmp_path):
    spec = on_two_processes(stochastic_spec(tmp_path))
    unbroken = run_forked(spec)
    spec = with_settings(spec, "killed")
    step = kill_after_checkpoint(spec, signal.SIGKILL, LAST)
    assert_equal(run_forked(spec), unbroken, step)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_train_killed_and_resumed_under_torchrun_equals_unbroken_run(tmp_path, number):
    spec = on_two_processes(stochastic_spec(tmp_path))
    unbroken = run(spec, *TWO_PROCESSES)
    spec = with_settings(spec, "killed", **WITH_IMAGES)
    step = kill_launcher_after_checkpoint(spec, number, LAST, *TWO_PROCESSES)
    assert_equal(run(spec, *TWO_PROCESSES), unbroken, step)
