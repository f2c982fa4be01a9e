"""Single-file checkpoint of a trained UNet: SDXL's original layout, equal weights after loading, and the header that programs read."""

import hashlib
import shutil
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, ResolvedModel, resolve_base_model
from sdxl_pipeline.models.components import (
    load_noise_scheduler,
    load_pipeline,
    load_text_encoders,
    load_unet,
    load_vae,
)
from sdxl_pipeline.release import single_file
from sdxl_pipeline.release.release_inputs import ExportError
from sdxl_pipeline.release.single_file import require_loadable, write_checkpoint
from tests.release.conftest import settings_in


def resolve_checkpoint(checkpoint: Path, folder: Path) -> ResolvedModel:
    """Return the checkpoint as a base model, with the bundled model's configurations and tokenizers in the folder of its name."""
    configs = checkpoint.with_suffix("")
    if not configs.exists():
        configs.symlink_to(BUNDLED_MODEL)
    settings = TrainingSettings(pretrained_model_name_or_path=str(checkpoint))
    return resolve_base_model(settings, folder, cache_dir=folder / "digests")


def write(folder: Path, inputs: dict[str, Any], unet_inputs: dict[str, Any], **settings: Any) -> Path:
    path = folder / "models" / "zorp.safetensors"
    path.parent.mkdir(exist_ok=True)
    updated = unet_inputs["settings"].model_copy(update=settings)
    weights = Path(unet_inputs["lora"].weights_path)
    write_checkpoint(path, weights, inputs["base_model"], updated, {"title": "zorp"})
    return path


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, bundled_model: ResolvedModel, made_unet: Path
) -> Path:
    """Return a written checkpoint of the trained UNet, which no test may change."""
    path = tmp_path_factory.mktemp("models") / "zorp.safetensors"
    settings = settings_in(path.parent).model_copy(update={"model_type": "full"})
    write_checkpoint(path, made_unet, bundled_model, settings, {"title": "zorp"})
    require_loadable(path, made_unet, bundled_model)
    return path


def assert_equal_weights(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual_state, expected_state = module.state_dict(), expected.state_dict()
    assert actual_state.keys() == expected_state.keys()
    assert all(torch.equal(actual_state[name], expected_state[name].half().float()) for name in actual_state)


def test_written_checkpoint_loads_with_equal_weights(
    checkpoint: Path, bundled_model: ResolvedModel, made_unet: Path, tmp_path: Path
):
    model = resolve_checkpoint(checkpoint, tmp_path)
    assert model.kind == "single_file"
    trained = UNet2DConditionModel.from_pretrained(made_unet)
    assert_equal_weights(load_unet(model, torch.float32), trained)
    base = bundled_model
    assert_equal_weights(load_vae(model, torch.float32), load_vae(base, torch.float32))
    encoders, expected = (load_text_encoders(source, torch.float32) for source in (model, base))
    assert_equal_weights(encoders.text_encoder, expected.text_encoder)
    assert_equal_weights(encoders.text_encoder_2, expected.text_encoder_2)


def test_written_checkpoint_generates_image_of_trained_unet(
    checkpoint: Path, bundled_model: ResolvedModel, made_unet: Path, tmp_path: Path
):
    model = resolve_checkpoint(checkpoint, tmp_path)
    trained = UNet2DConditionModel.from_pretrained(made_unet)
    images = [
        pipeline(
            "a red circle",
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        for pipeline in (
            load_pipeline(model, torch.float32),
            load_pipeline(bundled_model, torch.float32, unet=trained.eval()),
        )
    ]
    assert abs(images[0] - images[1]).max() <= 1 / 255


def test_release_of_unet_has_folder_and_checkpoint_with_modelspec(release, unet_inputs, tmp_path: Path):
    folder = release(**unet_inputs)
    path = folder / "demo.safetensors"
    assert (folder / "unet" / "config.json").is_file()
    assert (folder / "demo.json").is_file()
    assert (folder / "demo.png").is_file()
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.title"] == "demo"
    assert metadata["modelspec.trigger_phrase"] == "a zorp"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[8 + length :]).hexdigest()
    assert str(tmp_path) not in str(metadata)
    assert {str(tensor.dtype) for tensor in load_file(path).values()} == {"torch.float16", "torch.int64"}
    assert (release(**unet_inputs) / "demo.safetensors").read_bytes() == data


def test_write_checkpoint_marks_v_prediction_models(inputs, unet_inputs, tmp_path: Path):
    plain = write(tmp_path, inputs, unet_inputs)
    assert not {"v_pred", "ztsnr"} & load_file(plain).keys()
    marked = write(tmp_path, inputs, unet_inputs, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= load_file(marked).keys()
    config = load_noise_scheduler(resolve_checkpoint(marked, tmp_path)).config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr


def test_write_checkpoint_uses_configured_vae(inputs, unet_inputs, tmp_path: Path):
    vae = load_vae(inputs["base_model"], torch.float32)
    with torch.no_grad():
        vae.quant_conv.bias.add_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    settings = inputs["settings"].model_copy(
        update={"pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    )
    other = inputs | {"base_model": resolve_base_model(settings, tmp_path, cache_dir=tmp_path / "digests")}
    model = resolve_checkpoint(write(tmp_path, other, unet_inputs), tmp_path)
    assert_equal_weights(load_vae(model, torch.float32), vae)


@pytest.mark.parametrize("value", [70000.0, torch.inf, torch.nan])
def test_write_checkpoint_with_float16_overflow_raises(inputs, unet_inputs, tmp_path: Path, value: float):
    shards = Path(unet_inputs["lora"].weights_path).glob("*.safetensors")
    shard = next(shard for shard in shards if "conv_out.weight" in load_file(shard))
    tensors = load_file(shard)
    tensors["conv_out.weight"][0, 0] = value
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ExportError, match=r"out\.2\.weight holds values that are not finite in float16"):
        write(tmp_path, inputs, unet_inputs)
    assert list((tmp_path / "models").iterdir()) == []


def test_write_checkpoint_on_full_disk_writes_nothing(
    inputs, unet_inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(DiskFullError, match="the single-file checkpoint"):
        write(tmp_path, inputs, unet_inputs)
    assert list((tmp_path / "models").iterdir()) == []


def test_write_checkpoint_streams_the_unet(
    inputs, unet_inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count_alive(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        if name.startswith("model.diffusion_model."):
            alive.append(weakref.ref(tensor))
            most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(single_file, "_require_finite", count_alive)
    write(tmp_path, inputs, unet_inputs)
    assert len(alive) > 100
    assert most <= 2, "the tensor being written and the next one"


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["unet." + name] = tensors.pop(name)


def _transpose(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].transpose(0, 1).contiguous()


def _scale(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name] * 1.01


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_drop, "absent instead of"),
        (_rename, "missing"),
        (_transpose, "misshapen"),
        (_scale, "not the trained weight"),
    ],
)
def test_require_loadable_of_corrupt_checkpoint_raises(
    checkpoint: Path, bundled_model: ResolvedModel, made_unet: Path, tmp_path: Path, corrupt, message: str
):
    tensors = load_file(checkpoint)
    corrupt(tensors, "model.diffusion_model.time_embed.0.weight")
    path = tmp_path / "corrupt.safetensors"
    save_file(tensors, path)
    with pytest.raises(ExportError, match=message):
        require_loadable(path, made_unet, bundled_model)


def test_require_loadable_accepts_v_prediction_marker(inputs, unet_inputs, tmp_path: Path):
    path = write(tmp_path, inputs, unet_inputs, prediction_type="v_prediction")
    require_loadable(path, Path(unet_inputs["lora"].weights_path), inputs["base_model"])
