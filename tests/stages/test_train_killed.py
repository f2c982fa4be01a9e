"""Holds: twenty steps killed at a random one and resumed leave the very files of twenty unbroken ones, whatever the optimizer and however many processes."""

import signal
from pathlib import Path

import pytest

from sdxl_pipeline.release.formats.kohya_file import kohya_file_name
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from tests.support.train_programs import (
    TWO_PROCESSES,
    Listener,
    kill_all_on_the_way,
    kill_on_the_way,
    losses,
    on_two_processes,
    run,
    run_forked,
    with_settings,
)
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LAST = 20, 15

# Everything that could make a resumed run differ: dropout of adapter and captions, a choice of captions, posterior sampling,
# accumulation, a schedule, an average, epochs that end in the middle of a step.
HARD = {
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
OTHERS = ["adamw_bf16", "prodigy", "adamw_schedulefree", "adafactor", "optimi-stableadamw", "ao-adamw8bit"]


def hard_spec(folder: Path, **settings: object) -> TrainSpec:
    return make_spec(
        folder, make_dataset(folder / "dataset", captions=3), run="unbroken", **{**HARD, **settings}
    )


def files(manifest: TrainedLora) -> dict[str, bytes]:
    """The weights, those of their average, and the last checkpoint; of a file with dates in its header, the tensors."""
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
    [(signal.SIGTERM, {}), (signal.SIGKILL, LION)],
    ids=["SIGTERM-adamw", "SIGKILL-optimi-lion"],
)
def test_a_killed_run_leaves_the_bytes_of_an_unbroken_one(tmp_path, number, settings):
    spec = hard_spec(tmp_path, **settings)
    unbroken = main(spec, Listener(), StopSignal())
    # with images, which the unbroken run does not draw: they must not change a bit either
    spec = with_settings(spec, "killed", **WITH_IMAGES)
    step = kill_on_the_way(spec, number, LAST)
    resumed = main(spec, Listener(), StopSignal())
    assert_equal(resumed, unbroken, step)
    assert sorted({image.step for image in resumed.validation_images}) == [0, 10, 20]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("optimizer", OTHERS)
def test_so_does_a_run_with_any_optimizer(tmp_path, optimizer, number):
    spec = hard_spec(tmp_path, optimizer=optimizer, use_ema=optimizer != "adamw_schedulefree")
    unbroken = main(spec, Listener(), StopSignal())
    spec = with_settings(spec, "killed")
    step = kill_on_the_way(spec, number, LAST)
    assert_equal(main(spec, Listener(), StopSignal()), unbroken, step)


def test_so_does_a_run_on_two_processes(tmp_path):
    spec = on_two_processes(hard_spec(tmp_path))
    unbroken = run_forked(spec)
    spec = with_settings(spec, "killed")
    step = kill_on_the_way(spec, signal.SIGKILL, LAST)
    assert_equal(run_forked(spec), unbroken, step)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_so_does_one_that_torchrun_has_started(tmp_path, number):
    spec = on_two_processes(hard_spec(tmp_path))
    unbroken = run(spec, *TWO_PROCESSES)
    spec = with_settings(spec, "killed", **WITH_IMAGES)
    step = kill_all_on_the_way(spec, number, LAST, *TWO_PROCESSES)
    assert_equal(run(spec, *TWO_PROCESSES), unbroken, step)
