"""Base model resolution: from names to files and content digests, safetensors only, with a fix in every error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_pipeline.models.base_model import (
    BUNDLED_CLIP,
    BUNDLED_MODEL,
    BUNDLED_NAME,
    BUNDLED_TAESD,
    ResolvedModel,
)
from sdxl_pipeline.models.components import load_noise_scheduler, load_text_encoders, load_unet, load_vae
from sdxl_pipeline.models.model_files import (
    SCHEDULER_CONFIG,
    SINGLE_FILE_PREFIXES,
    BaseModelError,
    choose_component,
)
from tests.models.conftest import Resolve

BETAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
DISCRETE_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def change_weight(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def test_base_model_imports_no_torch():
    program = "import sys, sdxl_pipeline.models.base_model; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_bundled_model_and_companions_exist(bundled: ResolvedModel):
    assert bundled.kind == "folder"
    assert Path(bundled.path) == BUNDLED_MODEL
    assert bundled.revision is None
    assert set(bundled.digests) == {*PARTS, "tokenizer", "tokenizer_2", "scheduler", "pipeline"}
    assert (BUNDLED_CLIP / "config.json").is_file()
    assert (BUNDLED_TAESD / "config.json").is_file()


def test_resolved_model_json_round_trip(bundled: ResolvedModel):
    again = ResolvedModel.model_validate_json(bundled.model_dump_json())
    assert again == bundled
    assert again.digest == bundled.digest


def test_digests_of_a_copy_are_equal(bundled: ResolvedModel, resolve: Resolve, copy: Path):
    moved = resolve("copy")
    assert moved.path == str(copy)
    assert moved.digests == bundled.digests
    assert moved.digest == bundled.digest


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vae", {"vae_digest"}),
        ("unet", {"unet_digest"}),
        ("text_encoder", {"text_digest"}),
        ("text_encoder_2", {"text_digest"}),
        ("tokenizer", {"text_digest"}),
        ("tokenizer_2", {"text_digest"}),
        ("scheduler", set()),
    ],
)
def test_digests_change_only_for_the_changed_component(
    bundled: ResolvedModel, resolve: Resolve, copy: Path, part, changes
):
    if part in PARTS:
        change_weight(weights(copy, part))
    elif part == "scheduler":
        path = copy / "scheduler" / "scheduler_config.json"
        path.write_text(path.read_text().replace("epsilon", "v_prediction"))
    else:
        with (copy / part / "vocab.json").open("a") as file:
            file.write("\n")
    changed = resolve("copy")
    names = {"vae_digest", "unet_digest", "text_digest"}
    assert {name for name in names if getattr(changed, name) != getattr(bundled, name)} == changes
    assert changed.digest != bundled.digest


def test_digests_ignore_notes_of_the_saving_library(bundled: ResolvedModel, resolve: Resolve, copy: Path):
    path = copy / "vae" / "config.json"
    config = json.loads(path.read_text()) | {"_diffusers_version": "9.9", "_name_or_path": "elsewhere"}
    path.write_text(json.dumps(config, indent=7))
    assert resolve("copy").digest == bundled.digest
    path.write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert resolve("copy").vae_digest != bundled.vae_digest


def test_digest_cache_rehashes_only_changed_files(resolve: Resolve, copy: Path, monkeypatch):
    first = resolve("copy")

    def fail(path: Path) -> str:
        raise AssertionError(f"hashed again: {path}")

    large = [weights(copy, part) for part in PARTS if weights(copy, part).stat().st_size >= 1 << 20]
    assert large, "the bundled model has files large enough to be cached"
    with monkeypatch.context() as patch:
        patch.setattr(
            "sdxl_pipeline.models.model_files.sha256_file",
            lambda path: fail(path) if path in large else "0" * 64,
        )
        resolve("copy")
    os.utime(large[0], ns=(1, 1))
    assert resolve("copy").digest == first.digest
    change_weight(large[0])
    assert resolve("copy").digest != first.digest


def test_corrupt_digest_cache_is_rebuilt(resolve: Resolve, copy: Path, tmp_path: Path):
    first = resolve("copy")
    (tmp_path / "digest-cache" / "file_digests.json").write_text('{"cut')
    assert resolve("copy") == first


def test_fp16_files_are_preferred_and_loaded(resolve: Resolve, copy: Path):
    for part in PARTS:
        full = weights(copy, part)
        shutil.copy(full, full.with_suffix(".fp16.safetensors"))
        save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(full).items()}, full)
    model = resolve("copy")
    assert model.variants == dict.fromkeys(PARTS, "fp16")
    encoders = load_text_encoders(model, torch.float32)
    for module in (load_unet(model, torch.float32), load_vae(model, torch.float32), encoders.text_encoder):
        assert any(parameter.abs().max() > 0 for parameter in module.parameters())


@pytest.mark.parametrize(
    ("names", "chosen", "variant"),
    [
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], [1], "fp16"),
        (
            [
                "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.non_ema.safetensors",
                "model.onnx",
            ],
            [0],
            None,
        ),
        (
            [
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model-00002-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model.bin",
            ],
            [0, 1, 2],
            None,
        ),
        (
            [
                "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.safetensors",
            ],
            [0, 1],
            "fp16",
        ),
        (
            [
                "diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
            ],
            [0, 1],
            "fp16",
        ),
    ],
)
def test_choose_component_selects_one_complete_variant(names, chosen, variant):
    listing = ["unet/config.json", *(f"unet/{name}" for name in names), "sd_xl_base_1.0.safetensors"]
    files = choose_component(listing, "unet", "a model")
    assert files.weights == tuple(sorted(f"unet/{names[index]}" for index in chosen))
    assert files.variant == variant


def test_pickled_weights_raise_without_being_opened(resolve: Resolve, copy: Path):
    weights(copy, "unet").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        BaseModelError, match=r"copy.*unet.*diffusion_pytorch_model\.bin.*safetensors"
    ) as error:
        resolve("copy")
    assert "save_pretrained" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bundled:tiny", r"bundled:tiny-sdxl"),
        ("not a name", r"neither a file nor a folder"),
        ("a/b/c.safetensors", r"neither a file nor a folder"),
    ],
)
def test_unknown_model_name_raises_with_valid_forms(resolve: Resolve, name, message):
    with pytest.raises(BaseModelError, match=message):
        resolve(name)


def test_ckpt_file_raises(resolve: Resolve, tmp_path: Path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(BaseModelError, match=r"not a \.safetensors file"):
        resolve("model.ckpt")


def test_revision_of_a_local_model_raises(resolve: Resolve):
    with pytest.raises(BaseModelError, match=r"revision is 'main'"):
        resolve(BUNDLED_NAME, revision="main")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (
            lambda folder: (
                (folder / "tokenizer" / "vocab.json").unlink()
                or (folder / "tokenizer" / "tokenizer.json").unlink()
            ),
            "vocab.json",
        ),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "text_encoder/config.json is missing"),
        (lambda folder: weights(folder, "vae").unlink(), "has no diffusion_pytorch_model"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "is not JSON"),
    ],
)
def test_incomplete_folder_raises_with_the_missing_file(resolve: Resolve, copy: Path, damage, message):
    damage(copy)
    with pytest.raises(BaseModelError, match=message):
        resolve("copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline; this project trains Stable Diffusion XL"),
        ({"text_encoder": [None, None]}, "refiner"),
    ],
)
def test_other_model_types_raise(resolve: Resolve, copy: Path, change, message):
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BaseModelError, match=message):
        resolve("copy")


FLOW_MATCHING = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FLOW_MATCHING, "has no beta_schedule, has no beta_start, has no beta_end"),
        (EDM, "has no beta_schedule.*sigma_data, which is EDM's"),
        (BETAS | {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas true"),
        (BETAS | {"_class_name": "EulerDiscreteScheduler", "beta_schedule": None}, "has no beta_schedule"),
    ],
)
def test_scheduler_without_discrete_betas_raises(resolve: Resolve, copy: Path, config, reason):
    (copy / SCHEDULER_CONFIG).write_text(json.dumps(config))
    message = rf"copy: scheduler/scheduler_config\.json \(_class_name '{config['_class_name']}'\).*{reason}.*scaled_linear"
    with pytest.raises(BaseModelError, match=message):
        resolve("copy")


@pytest.mark.parametrize("name", DISCRETE_SCHEDULERS)
def test_scheduler_with_discrete_betas_is_accepted_with_its_betas(resolve: Resolve, copy: Path, name):
    getattr(diffusers, name)(**BETAS).save_pretrained(copy / "scheduler")
    betas = load_noise_scheduler(resolve("copy")).betas
    assert torch.equal(betas, diffusers.DDPMScheduler(**BETAS).betas)


def test_single_file_with_scheduler_of_other_kind_beside_it_raises(
    resolve: Resolve, copy: Path, tmp_path: Path
):
    checkpoint = tmp_path / "copy.safetensors"
    save_file({f"{prefix}x": torch.zeros(1) for prefix in SINGLE_FILE_PREFIXES.values()}, checkpoint)
    (copy / SCHEDULER_CONFIG).write_text(json.dumps(FLOW_MATCHING))
    with pytest.raises(BaseModelError, match="FlowMatchEulerDiscreteScheduler"):
        resolve("copy.safetensors")


@pytest.mark.parametrize("location", ["copy", "copy/vae", "vae.safetensors"])
def test_replacement_vae_is_resolved_and_loaded(
    bundled: ResolvedModel, resolve: Resolve, copy: Path, tmp_path: Path, location
):
    change_weight(weights(copy, "vae"))
    shutil.copy(weights(copy, "vae"), tmp_path / "vae.safetensors")
    model = resolve(BUNDLED_NAME, vae=location)
    assert model.vae_source == location
    assert model.vae_digest != bundled.vae_digest
    assert (model.text_digest, model.unet_digest) == (bundled.text_digest, bundled.unet_digest)
    expected = load_file(weights(copy, "vae"))
    loaded = load_vae(model, torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in expected.items())


def test_replacement_vae_of_equal_content_has_the_same_digest(
    bundled: ResolvedModel, resolve: Resolve, copy: Path
):
    assert resolve(BUNDLED_NAME, vae="copy/vae").vae_digest == bundled.vae_digest
