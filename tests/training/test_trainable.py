"""What each model_type trains, in which dtype, and its files as diffusers' own loaders read them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sdxl_pipeline.training.trainer_setup import build_trainable
from tests.support.training_datasets import make_spec


def full_spec(folder: Path, **settings: object):
    # adapter settings are invalid with model_type full
    return make_spec(folder, **{"model_type": "full", "lora_rank": 16, **settings})


def test_build_trainable_full_trains_all_weights_in_float32(tmp_path):
    trainable = build_trainable(full_spec(tmp_path))
    assert trainable.kind == "unet"
    assert trainable.parameters.keys() == trainable.unet.state_dict().keys()
    assert {parameter.dtype for parameter in trainable.parameters.values()} == {torch.float32}
    assert trainable.export_is_exact


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", torch.float32), ("optimi-lion", torch.bfloat16), ("adamw_bf16", torch.bfloat16)],
)
def test_build_trainable_full_bf16_weights_only_for_bf16_optimizers(tmp_path, optimizer, dtype):
    trainable = build_trainable(full_spec(tmp_path, mixed_precision="bf16", optimizer=optimizer))
    assert {parameter.dtype for parameter in trainable.unet.parameters()} == {dtype}


def test_build_trainable_bitfit_trains_only_biases(tmp_path):
    trainable = build_trainable(full_spec(tmp_path, layer_freeze_strategy="bitfit"))
    assert trainable.parameters
    assert all(name.endswith(".bias") for name in trainable.parameters)
    assert not trainable.export_is_exact, "a checkpoint must store them separately"


def test_trainable_unet_write_is_deterministic_diffusers_folder_without_local_paths(tmp_path):
    trainable = build_trainable(full_spec(tmp_path))
    with torch.no_grad():
        for number, parameter in enumerate(trainable.parameters.values()):
            parameter += 0.001 * (number + 1)
    for name in ("first", "second"):
        trainable.write(tmp_path / name / "unet", {})
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "first", subfolder="unet", use_safetensors=True)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainable.parameters[name]), name
    config = (tmp_path / "first" / "unet" / "config.json").read_text()
    assert str(tmp_path) not in config
    assert "/tmp" not in config
    assert json.loads(config)["_class_name"] == "UNet2DConditionModel"
    first, second = (sorted((tmp_path / name / "unet").iterdir()) for name in ("first", "second"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert [file.name for file in first] == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    "settings",
    [{"layer_freeze_strategy": "bitfit"}, {}, {"model_type": "lora", "lora_rank": 16}],
    ids=["bitfit", "all", "lora"],
)
def test_trainable_export_bytes_matches_written_files(tmp_path, settings):
    trainable = build_trainable(full_spec(tmp_path, **settings))
    (tmp_path / "run").mkdir()
    trainable.write(tmp_path / "run" / trainable.weights_name, {})
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert trainable.export_bytes == pytest.approx(written, rel=0.1)


def test_trainable_unet_write_replaces_existing_folder(tmp_path):
    trainable = build_trainable(full_spec(tmp_path))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"")
    trainable.write(tmp_path / "unet", {})
    (shard,) = (tmp_path / "unet").glob("*.safetensors")
    assert load_file(shard).keys() == trainable.parameters.keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
