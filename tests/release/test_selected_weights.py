"""The selected checkpoint as a finished run that ended with it."""

from pathlib import Path

import pytest

from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.release.release_inputs import ReleaseError
from sdxl_pipeline.release.selected_weights import selected_lora
from sdxl_pipeline.runtime.specs import CheckpointWeights, TrainedLora, TrainSpec
from tests.support.finished_run import WEIGHTS, write_finished_run
from tests.support.training_datasets import make_dataset, make_spec


def spec_of(folder: Path) -> TrainSpec:
    return make_spec(folder, make_dataset(folder / "dataset", captions=2), lora_format="diffusers")


def checkpoint(lora: TrainedLora, step: int = 6, name: str = WEIGHTS, **changes: object) -> CheckpointWeights:
    path = Path(lora.run_dir) / "checkpoints" / f"step-{step:08d}" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights of a checkpoint")
    values = {
        "step": step,
        "epochs": 1.5,
        "samples": 12,
        "weights": "trained",
        "path": str(path),
        "sha256": sha256_path(path),
        "is_final": False,
    }
    return CheckpointWeights.model_validate(values | changes)


def test_selected_lora_of_the_final_weights_is_the_run_itself(tmp_path):
    lora = write_finished_run(tmp_path / "run")
    final = checkpoint(lora, 12, is_final=True)
    assert selected_lora(lora, None, spec_of(tmp_path)) is lora
    assert selected_lora(lora, final, spec_of(tmp_path)) is lora


def test_selected_lora_describes_the_checkpoint_and_survives_its_deletion(tmp_path):
    lora, spec = write_finished_run(tmp_path / "run", kohya_path="x", kohya_sha256="y"), spec_of(tmp_path)
    weights = checkpoint(lora)
    before = sorted(Path(weights.path).parent.iterdir())
    selected = selected_lora(lora, weights, spec)
    path = tmp_path / "run" / "selected" / "step-00000006" / WEIGHTS
    assert Path(selected.weights_path) == path
    assert path.read_bytes() == b"weights of a checkpoint"
    assert (selected.steps, selected.epochs, selected.samples) == (6, 1.5, 12)
    assert (selected.weights_sha256, selected.identity) == (weights.sha256, lora.identity)
    assert (selected.kohya_path, selected.kohya_sha256) == (None, None)
    assert sorted(Path(weights.path).parent.iterdir()) == before

    Path(weights.path).unlink()
    assert selected_lora(lora, weights, spec) == selected
    path.write_bytes(b"damaged")
    with pytest.raises(ReleaseError, match="is missing, or is not the checkpoint that was evaluated"):
        selected_lora(lora, weights, spec)


def test_selected_lora_keeps_trained_and_averaged_weights_apart(tmp_path):
    lora, spec = write_finished_run(tmp_path / "run", released_weights="ema"), spec_of(tmp_path)
    trained, ema = checkpoint(lora, 12, is_final=True), checkpoint(lora, weights="ema")
    assert Path(selected_lora(lora, trained, spec).weights_path).parent.name == "step-00000012"
    selected = selected_lora(lora, ema, spec)
    assert Path(selected.weights_path).parent.name == "step-00000006-ema"
    assert selected.released_weights == "ema"


def test_selected_lora_of_a_unet_copies_its_folder(tmp_path):
    lora = write_finished_run(tmp_path / "run", weights_kind="unet")
    weights = checkpoint(lora, name="unet/model.safetensors")
    folder = Path(weights.path).parent
    weights = weights.model_copy(update={"path": str(folder), "sha256": sha256_path(folder)})
    selected = selected_lora(lora, weights, spec_of(tmp_path))
    assert Path(selected.weights_path) == tmp_path / "run" / "selected" / "step-00000006" / "unet"
    assert sha256_path(Path(selected.weights_path)) == weights.sha256
