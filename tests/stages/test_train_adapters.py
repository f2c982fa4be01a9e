"""Holds the trainer with every kind of adapter: its file is the model that drew the last validation images, a resumed run gives the
same bytes, two processes train as one, and a run may start from a file, which is part of what the run is.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter import UNET, load_adapter
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.format_check import check_files
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.stages import train
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.validation.validation_images import generate_validation_images
from tests.models.adapted_unets import KINDS
from tests.support.train_programs import TWO_PROCESSES, Listener, losses, on_two_processes, run, with_settings
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 0,
    "validation_disable": False,
    "validation_step_interval": 0,
}


def adapter_spec(folder: Path, kind: str, **settings) -> TrainSpec:
    return make_spec(folder, make_dataset(folder / "dataset"), **{**SETTINGS, **KINDS[kind], **settings})


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize("kind", ["dora", "lokr, whole matrices", "loha, weights rebuilt, scalar"])
def test_the_file_is_the_model_that_drew_and_a_resumed_run_gives_its_bytes(tmp_path: Path, kind: str):
    spec = adapter_spec(tmp_path, kind)
    manifest = main(spec, Listener(), StopSignal())
    unet = load_unet(spec.base_model, torch.float32)
    names = load_adapter({UNET: unet}, Path(manifest.weights_path))[UNET]
    assert manifest.adapted_modules == len(names)
    tensors = load_file(manifest.weights_path)
    stored = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha"))
    scalars = manifest.adapted_modules if "scalar" in kind else 0
    assert manifest.trainable_parameters == stored + scalars

    (trained,) = [
        image for image in manifest.validation_images if image.step == spec.settings.max_train_steps
    ]
    reader = BatchReader(spec.datasets, None)
    (again,) = generate_validation_images(spec, unet, reader, 4, tmp_path / "again")
    assert np.abs(pixels(trained.path) - pixels(again.path)).max() <= 1
    plain = load_unet(spec.base_model, torch.float32)
    (base,) = generate_validation_images(spec, plain, reader, 4, tmp_path / "base")
    assert np.abs(pixels(trained.path) - pixels(base.path)).max() > 1

    resumed = with_settings(spec, "resumed")
    shutil.copytree(spec.run_dir, resumed.run_dir)
    for left in ("finished.json", "pytorch_lora_weights.safetensors"):
        (Path(resumed.run_dir) / left).unlink()
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step-00000004")
    went_on = main(resumed, Listener(), StopSignal())
    assert went_on.resumed_from_step == 2
    assert went_on.weights_sha256 == manifest.weights_sha256


def test_a_finished_run_writes_the_formats_that_are_asked_for_without_training(tmp_path: Path, monkeypatch):
    ema = {"use_ema": True, "ema_validation": "none", "released_weights": "ema"}
    spec = adapter_spec(tmp_path, "lora", max_train_steps=2, lora_format="diffusers", **ema)
    first = main(spec, Listener(), StopSignal())
    assert first.kohya_path is None
    assert not list(Path(spec.run_dir).rglob("small.safetensors"))

    both = with_settings(spec, "run", lora_format="both")
    second = main(both, Listener(), StopSignal())
    assert second.reused
    assert second.weights_sha256 == first.weights_sha256
    assert second.kohya_path == str(Path(spec.run_dir) / "ema" / "small.safetensors")
    assert second.kohya_dtype == "float16"
    assert sha256_file(Path(second.kohya_path)) == second.kohya_sha256
    assert "updates equal to the trained ones" in check_files(second, spec.base_model, "both")
    trained = load_file(Path(spec.run_dir) / "small.safetensors")
    averaged = load_file(second.kohya_path)
    assert trained.keys() == averaged.keys()
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)

    other = main(with_settings(both, "run", lora_export_dtype="bfloat16"), Listener(), StopSignal())
    assert (other.reused, other.kohya_dtype) == (True, "bfloat16")
    assert (
        main(with_settings(both, "run", lora_format="diffusers"), Listener(), StopSignal()).kohya_path is None
    )

    def refuse(*arguments: object) -> None:
        raise FormatError("cannot hold it")

    monkeypatch.setattr(train, "ensure_kohya_file", refuse)
    listener = Listener()
    assert main(both, listener, StopSignal()).kohya_path is None
    assert any("No file for ComfyUI" in line and "cannot hold it" in line for line in listener.lines)


def test_trained_text_encoders_are_in_the_kohya_file(tmp_path: Path):
    spec = adapter_spec(tmp_path, "lora", max_train_steps=2, validation_disable=True, train_text_encoder=True)
    manifest = main(spec, Listener(), StopSignal())
    modules = {name.partition(".")[0] for name in load_file(manifest.kohya_path)}
    # of the bundled encoders' three layers, the last of the first one is not used
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in modules) == 2 * 4
    assert sum(name.startswith("lora_te2_text_model_encoder_layers_") for name in modules) == 3 * 4
    assert "156 of 156" in check_files(manifest, spec.base_model, "both")


def test_a_run_starts_from_a_file_whose_content_is_part_of_what_it_is(tmp_path: Path):
    first = main(
        adapter_spec(tmp_path, "lora", max_train_steps=2, validation_disable=True), Listener(), StopSignal()
    )
    spec = adapter_spec(tmp_path, "lora", init_lora=first.weights_path, validation_step_interval=100)
    spec = spec.model_copy(update={"run_dir": str(tmp_path / "second")})
    second = main(spec, Listener(), StopSignal())
    unet = load_unet(spec.base_model, torch.float32)
    load_adapter({UNET: unet}, Path(first.weights_path))
    (again,) = generate_validation_images(spec, unet, BatchReader(spec.datasets, None), 0, tmp_path / "again")
    (start,) = [image for image in second.validation_images if image.step == 0]
    assert np.array_equal(pixels(start.path), pixels(again.path))

    moved = shutil.copy(first.weights_path, tmp_path / "moved.safetensors")
    identity = run_identity(spec)
    assert run_identity(with_settings(spec, "run", init_lora=str(moved))) == identity
    assert run_identity(with_settings(spec, "run", init_lora=second.weights_path)) != identity
    assert run_identity(with_settings(spec, "run", init_lora=None)) != identity
    with pytest.raises(UserError, match=r"init_lora.*does not exist"):
        run_identity(with_settings(spec, "run", init_lora=str(tmp_path / "absent.safetensors")))
    with pytest.raises(UserError, match=r"config.json: init_lora.*Set lora_rank to 4"):
        main(with_settings(spec, "other rank", lora_rank=8), Listener(), StopSignal())


def test_the_reference_reads_the_configuration_in_the_header(tmp_path: Path):
    from safetensors import safe_open

    manifest = main(
        adapter_spec(tmp_path, "lokr, whole matrices", max_train_steps=1, validation_disable=True),
        Listener(),
        StopSignal(),
    )
    with safe_open(manifest.weights_path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lycoris_config"])["factor"] == 12
    assert metadata["step"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha, convolutions"])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path, kind: str):
    spec = adapter_spec(tmp_path, kind, train_batch_size=1, validation_disable=True, learning_rate=1e-3)
    one = main(with_settings(spec, "one", train_batch_size=2), Listener(), StopSignal())
    two: TrainedLora = run(on_two_processes(with_settings(spec, "two")), *TWO_PROCESSES)
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    ones, twos = load_file(one.weights_path), load_file(two.weights_path)
    assert ones.keys() == twos.keys()
    for name, tensor in ones.items():
        # AdamW makes a step of the learning rate of a gradient that is all rounding
        torch.testing.assert_close(twos[name], tensor, rtol=0, atol=5e-4)
