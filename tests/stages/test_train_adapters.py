"""Training of each kind of adapter: the weights file reproduces the last validation images, resume is bit-exact, two processes equal one,
and `init_lora` is part of the identity.
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
from sdxl_pipeline.training.trainer_setup import image_generator
from tests.models.adapted_unets import KINDS
from tests.support.train_programs import (
    TWO_PROCESSES,
    RecordingReporter,
    losses,
    on_two_processes,
    run,
    with_settings,
)
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


@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("lokr, whole matrices", "loha, weights rebuilt, scalar")
        ),
    ],
)
def test_train_adapter_file_reproduces_validation_image_and_resume_is_exact(tmp_path: Path, kind: str):
    spec = adapter_spec(tmp_path, kind)
    manifest = main(spec, RecordingReporter(), StopSignal())
    unet = load_unet(spec.base_model, torch.float32)
    names = load_adapter({UNET: unet}, Path(manifest.weights_path))[UNET]
    assert manifest.adapted_modules == len(names)
    tensors = load_file(manifest.weights_path)
    stored = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".alpha"))
    scalars = manifest.adapted_modules if "scalar" in kind else 0
    assert manifest.trainable_parameters == stored + scalars

    (expected,) = [
        image for image in manifest.validation_images if image.step == spec.settings.max_train_steps
    ]
    reader = BatchReader(spec.datasets, None)
    (reproduced,) = image_generator(spec, reader, tmp_path / "again").generate(unet, 4)
    assert np.abs(pixels(expected.path) - pixels(reproduced.path)).max() <= 1
    plain = load_unet(spec.base_model, torch.float32)
    (base,) = image_generator(spec, reader, tmp_path / "base").generate(plain, 4)
    assert np.abs(pixels(expected.path) - pixels(base.path)).max() > 1

    resumed = with_settings(spec, "resumed")
    shutil.copytree(spec.run_dir, resumed.run_dir)
    for name in ("finished.json", "pytorch_lora_weights.safetensors"):
        (Path(resumed.run_dir) / name).unlink()
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step-00000004")
    again = main(resumed, RecordingReporter(), StopSignal())
    assert again.resumed_from_step == 2
    assert again.weights_sha256 == manifest.weights_sha256


@pytest.mark.slow
def test_train_finished_run_writes_new_lora_format_without_training(tmp_path: Path, monkeypatch):
    ema = {"use_ema": True, "ema_validation": "none", "released_weights": "ema"}
    spec = adapter_spec(tmp_path, "lora", max_train_steps=2, lora_format="diffusers", **ema)
    first = main(spec, RecordingReporter(), StopSignal())
    assert first.kohya_path is None
    assert not list(Path(spec.run_dir).rglob("small.safetensors"))

    both = with_settings(spec, "run", lora_format="both")
    second = main(both, RecordingReporter(), StopSignal())
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

    other = main(with_settings(both, "run", lora_export_dtype="bfloat16"), RecordingReporter(), StopSignal())
    assert (other.reused, other.kohya_dtype) == (True, "bfloat16")
    assert (
        main(
            with_settings(both, "run", lora_format="diffusers"), RecordingReporter(), StopSignal()
        ).kohya_path
        is None
    )

    def raise_format_error(*arguments: object) -> None:
        raise FormatError("cannot hold it")

    monkeypatch.setattr(train, "ensure_kohya_file", raise_format_error)
    reporter = RecordingReporter()
    assert main(both, reporter, StopSignal()).kohya_path is None
    assert any("No file for ComfyUI" in line and "cannot hold it" in line for line in reporter.lines)


def test_train_text_encoder_kohya_file_contains_text_encoder_keys(tmp_path: Path):
    spec = adapter_spec(tmp_path, "lora", max_train_steps=2, validation_disable=True, train_text_encoder=True)
    manifest = main(spec, RecordingReporter(), StopSignal())
    modules = {name.partition(".")[0] for name in load_file(manifest.kohya_path)}
    # each bundled encoder has three layers; the last one of the first encoder is not used
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in modules) == 2 * 4
    assert sum(name.startswith("lora_te2_text_model_encoder_layers_") for name in modules) == 3 * 4
    assert "156 of 156" in check_files(manifest, spec.base_model, "both")


@pytest.mark.slow
def test_train_init_lora_starts_from_file_and_content_is_in_identity(tmp_path: Path):
    first = main(
        adapter_spec(tmp_path, "lora", max_train_steps=2, validation_disable=True),
        RecordingReporter(),
        StopSignal(),
    )
    spec = adapter_spec(tmp_path, "lora", init_lora=first.weights_path, validation_step_interval=100)
    spec = spec.model_copy(update={"run_dir": str(tmp_path / "second")})
    second = main(spec, RecordingReporter(), StopSignal())
    unet = load_unet(spec.base_model, torch.float32)
    load_adapter({UNET: unet}, Path(first.weights_path))
    reader = BatchReader(spec.datasets, None)
    (again,) = image_generator(spec, reader, tmp_path / "again").generate(unet, 0)
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
        main(with_settings(spec, "other rank", lora_rank=8), RecordingReporter(), StopSignal())


def test_train_lokr_file_header_contains_lycoris_config(tmp_path: Path):
    from safetensors import safe_open

    manifest = main(
        adapter_spec(tmp_path, "lokr, whole matrices", max_train_steps=1, validation_disable=True),
        RecordingReporter(),
        StopSignal(),
    )
    with safe_open(manifest.weights_path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lycoris_config"])["factor"] == 12
    assert metadata["step"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha, convolutions"])
def test_train_adapter_two_processes_equal_one_with_double_batch(tmp_path: Path, kind: str):
    spec = adapter_spec(tmp_path, kind, train_batch_size=1, validation_disable=True, learning_rate=1e-3)
    one = main(with_settings(spec, "one", train_batch_size=2), RecordingReporter(), StopSignal())
    two: TrainedLora = run(on_two_processes(with_settings(spec, "two")), *TWO_PROCESSES)
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-5)
    ones, twos = load_file(one.weights_path), load_file(two.weights_path)
    assert ones.keys() == twos.keys()
    for name, tensor in ones.items():
        # AdamW takes a step of the size of the learning rate for a gradient that is only rounding
        torch.testing.assert_close(twos[name], tensor, rtol=0, atol=5e-4)
