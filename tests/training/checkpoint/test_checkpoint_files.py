"""The published weights of a finished run's checkpoints, found without reading a tensor."""

import json
from pathlib import Path

import pytest

from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.runtime.specs import EMA_FOLDER, Ancestor, RunLineage, TrainedLora
from sdxl_pipeline.training.checkpoint.checkpoint_files import CHECKPOINTS, run_checkpoints
from sdxl_pipeline.training.checkpoint.checkpoints import import_checkpoint, save_checkpoint
from tests.support.finished_run import WEIGHTS, write_finished_run
from tests.training.checkpoint.test_checkpoints import make_state

IDENTITY = "a" * 64


def export(folder: Path) -> Path:
    """Write an adapter and its EMA as the trainer does."""
    (folder / EMA_FOLDER).mkdir(exist_ok=True)
    for file in (folder / WEIGHTS, folder / EMA_FOLDER / WEIGHTS):
        file.write_text(str(file))
    return folder / WEIGHTS


def export_unet(folder: Path) -> Path:
    (folder / "unet" / "shards").mkdir(parents=True)
    for name in ("config.json", "shards/b.safetensors", "shards/a.safetensors", "z.safetensors"):
        (folder / "unet" / name).write_text(name)
    return folder / "unet"


def save(run_dir: Path, step: int, identity: str = IDENTITY, **options: object) -> Path:
    arguments = {"export": export, **options}
    return save_checkpoint(run_dir / CHECKPOINTS, identity, make_state(step), **arguments)


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def listed(lora: TrainedLora) -> list[tuple[int, str, bool]]:
    return [(each.step, each.weights, each.is_final) for each in run_checkpoints(lora)]


def test_run_checkpoints_without_checkpoints_returns_the_final_weights(run_dir):
    lora = write_finished_run(run_dir)
    (final,) = run_checkpoints(lora)
    assert (final.step, final.epochs, final.samples, final.is_final) == (12, 3.0, 24, True)
    assert (final.path, final.sha256) == (lora.weights_path, lora.weights_sha256)


@pytest.mark.parametrize("released", ["trained", "ema"])
def test_run_checkpoints_are_sorted_by_step_with_the_released_weights_last(run_dir, released):
    for step in (12, 10, 4):  # the checkpoint of the last step has the final weights
        save(run_dir, step)
    save(run_dir, 4, kind="rolling")
    (run_dir / EMA_FOLDER).mkdir()
    for folder in (run_dir, run_dir / EMA_FOLDER):
        (folder / WEIGHTS).write_text(folder.name)
    lora = write_finished_run(
        run_dir,
        weights=WEIGHTS if released == "trained" else f"{EMA_FOLDER}/{WEIGHTS}",
        released_weights=released,
    )
    other = "ema" if released == "trained" else "trained"
    expected = [(step, weights, step == 12) for step in (4, 10, 12) for weights in (other, released)]
    assert listed(lora) == expected
    found = run_checkpoints(lora)
    assert all(sha256_path(Path(each.path)) == each.sha256 for each in found)
    assert found[-1].path == lora.weights_path
    assert all("rolling" not in each.path for each in found)
    assert [each.name for each in found[:2]] == ["step-4", "step-4"]


def test_run_checkpoints_digest_of_a_unet_equals_that_of_its_folder(run_dir):
    save(run_dir, 4, export=export_unet, exports_parameters=True)
    export_unet(run_dir)
    lora = write_finished_run(run_dir, weights="unet", weights_kind="unet")
    checkpoint, _ = run_checkpoints(lora)
    assert checkpoint.path == str(run_dir / CHECKPOINTS / "step-00000004" / "unet")
    assert checkpoint.sha256 == sha256_path(Path(checkpoint.path))


def test_run_checkpoints_estimates_epochs_and_samples_from_the_step(run_dir):
    save(run_dir, 4)
    trained = run_checkpoints(write_finished_run(run_dir))[1]
    assert (trained.epochs, trained.samples) == (pytest.approx(1.0), 8)


def test_run_checkpoints_skips_corrupt_and_incomplete_checkpoints(run_dir):
    save(run_dir, 4)
    state = save(run_dir, 6) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 7}))
    (save(run_dir, 8) / WEIGHTS).unlink()
    assert {step for step, weights, final in listed(write_finished_run(run_dir)) if weights == "trained"} == {
        4,
        12,
    }


@pytest.mark.parametrize("same_trajectory", [True, False])
def test_run_checkpoints_contains_an_imported_checkpoint_of_the_same_trajectory(
    tmp_path, run_dir, same_trajectory
):
    source = save(tmp_path / "other", 4, identity="b" * 64)
    ancestor = Ancestor(
        identity="b" * 64, step=4, same_trajectory=same_trajectory, takes_optimizer=same_trajectory
    )
    lineage = RunLineage(
        identity=IDENTITY, trajectory="t", any_length="l", optimizer="adamw", ancestor=ancestor
    )
    import_checkpoint(source, run_dir / CHECKPOINTS, lineage)
    save(run_dir, 8, identity="c" * 64)  # of another run
    steps = {each.step for each in run_checkpoints(write_finished_run(run_dir, IDENTITY))}
    assert steps == ({4, 12} if same_trajectory else {12})
