"""A single checkpoint in SDXL's original layout gives the weights of the folder it was made from, without a network.

The checkpoint is written here under the original names (tests.models.original_layout), at the bundled model's sizes. At SDXL-base's own
sizes the names and shapes are checked on the meta device, where no memory is needed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME, SDXL_BASE_CONFIGS, ResolvedModel
from sdxl_pipeline.models.components import (
    load_noise_scheduler,
    load_pipeline,
    load_text_encoders,
    load_unet,
    load_vae,
)
from sdxl_pipeline.models.model_files import BaseModelError
from tests.models.conftest import Resolve
from tests.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    unet_tensors,
    vae_tensors,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def tensors(bundled: ResolvedModel) -> dict[str, torch.Tensor]:
    encoders = load_text_encoders(bundled, torch.float16)
    return {
        **unet_tensors(load_unet(bundled, torch.float16)),
        **vae_tensors(load_vae(bundled, torch.float16)),
        **first_text_tensors(encoders.text_encoder),
        **second_text_tensors(encoders.text_encoder_2),
    }


@pytest.fixture
def checkpoint(tensors, tmp_path: Path, monkeypatch) -> Path:
    """shapes.safetensors, with a companion folder shapes/ of configurations and tokenizers, and no network."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write_checkpoint(tmp_path / "shapes.safetensors", tensors)
    shutil.copytree(BUNDLED_MODEL, tmp_path / "shapes", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "shapes.safetensors"


def assert_same_weights(module: torch.nn.Module, expected: torch.nn.Module) -> None:
    state, expected_state = module.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


def test_single_file_components_equal_the_folders_weights(
    checkpoint, bundled: ResolvedModel, resolve: Resolve
):
    model = resolve("shapes.safetensors")
    assert model.kind == "single_file"
    assert_same_weights(load_unet(model, torch.float32), load_unet(bundled, torch.float32))
    assert_same_weights(load_vae(model, torch.float32), load_vae(bundled, torch.float32))
    encoders, expected = (load_text_encoders(which, torch.float32) for which in (model, bundled))
    assert_same_weights(encoders.text_encoder, expected.text_encoder)
    assert_same_weights(encoders.text_encoder_2, expected.text_encoder_2)
    assert encoders.tokenizer("a red star").input_ids == expected.tokenizer("a red star").input_ids


def test_upper_case_suffix_is_accepted(checkpoint, bundled: ResolvedModel, resolve: Resolve):
    checkpoint.rename(checkpoint.with_suffix(".SAFETENSORS"))
    model = resolve("shapes.SAFETENSORS", vae="shapes.SAFETENSORS")
    assert model.kind == "single_file"
    assert_same_weights(load_unet(model, torch.float32), load_unet(bundled, torch.float32))
    assert_same_weights(load_vae(model, torch.float32), load_vae(bundled, torch.float32))


def test_single_file_pipeline_samples_the_same_image(checkpoint, bundled: ResolvedModel, resolve: Resolve):
    images = [
        load_pipeline(model, torch.float32)(
            "a red circle",
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        for model in (resolve("shapes.safetensors"), bundled)
    ]
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize(
    ("prefix", "changed"),
    [
        ("model.diffusion_model.", "unet_digest"),
        ("first_stage_model.", "vae_digest"),
        ("conditioner.embedders.0.", "text_digest"),
        ("conditioner.embedders.1.", "text_digest"),
    ],
)
def test_single_file_digests_are_per_component(checkpoint: Path, tensors, resolve: Resolve, prefix, changed):
    before = resolve("shapes.safetensors")
    name = next(name for name in tensors if name.startswith(prefix))
    write_checkpoint(checkpoint, {**tensors, name: tensors[name] + 1})
    after = resolve("shapes.safetensors")
    names = ("unet_digest", "vae_digest", "text_digest")
    assert [name for name in names if getattr(before, name) != getattr(after, name)] == [changed]


def test_single_file_uses_configurations_beside_it(checkpoint: Path, resolve: Resolve, tmp_path: Path):
    companion = resolve("shapes.safetensors")
    shutil.move(str(checkpoint), tmp_path / "shapes" / "other.safetensors")
    beside = resolve("shapes/other.safetensors")
    assert beside.config_path == str(tmp_path / "shapes")
    assert beside.digest == companion.digest


def test_single_file_without_companions_uses_sdxl_base_and_requires_tokenizers(
    checkpoint: Path, resolve: Resolve, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))
    shutil.rmtree(tmp_path / "shapes")
    with pytest.raises(BaseModelError, match=r"tokenizer and tokenizer_2 into .*shapes, or connect once"):
        resolve("shapes.safetensors")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED_MODEL / tokenizer, tmp_path / tokenizer)
    model = resolve("shapes.safetensors")
    assert model.config_path == str(SDXL_BASE_CONFIGS)
    for load in (load_unet, load_vae, load_text_encoders):
        with pytest.raises(BaseModelError, match="is not built like SDXL-base"):
            load(model, torch.float32)


def test_single_file_v_prediction_markers_affect_scheduler_and_digest(
    checkpoint: Path, tensors, resolve: Resolve
):
    plain = resolve("shapes.safetensors")
    assert load_noise_scheduler(plain).config.prediction_type == "epsilon"
    write_checkpoint(checkpoint, {**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    marked = resolve("shapes.safetensors")
    scheduler = load_noise_scheduler(marked)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6, "zero terminal SNR"
    assert load_pipeline(marked, torch.float32).scheduler.config.prediction_type == "v_prediction"
    assert marked.digest != plain.digest
    assert marked.unet_digest == plain.unet_digest


def test_single_file_of_edm_raises(checkpoint: Path, tensors, resolve: Resolve):
    write_checkpoint(checkpoint, {**tensors, "edm_mean": torch.zeros(4)})
    with pytest.raises(BaseModelError, match="EDM"):
        resolve("shapes.safetensors")


def test_single_file_without_vae_requires_one(
    checkpoint: Path, tensors, bundled: ResolvedModel, resolve: Resolve
):
    write_checkpoint(checkpoint, {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")})
    with pytest.raises(BaseModelError, match=r"lacks vae .*pretrained_vae_model_name_or_path"):
        resolve("shapes.safetensors")
    model = resolve("shapes.safetensors", vae=str(BUNDLED_MODEL / "vae"))
    assert model.vae_digest == bundled.vae_digest
    assert_same_weights(load_vae(model, torch.float32), load_vae(bundled, torch.float32))


def test_single_file_that_is_a_lora_or_corrupt_raises(checkpoint: Path, tensors, resolve: Resolve):
    write_checkpoint(checkpoint, {"lora_unet_x.lora_up.weight": torch.zeros(1)})
    with pytest.raises(BaseModelError, match="not a complete SDXL checkpoint"):
        resolve("shapes.safetensors")
    write_checkpoint(checkpoint, tensors)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="is truncated"):
        resolve("shapes.safetensors")
    checkpoint.write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        resolve("shapes.safetensors")


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("model.diffusion_model.out.2.bias", load_unet),
        ("first_stage_model.quant_conv.weight", load_vae),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", load_text_encoders),
        ("conditioner.embedders.1.model.ln_final.weight", load_text_encoders),
    ],
)
def test_single_file_with_a_missing_weight_raises(checkpoint: Path, tensors, resolve: Resolve, name, load):
    write_checkpoint(checkpoint, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(BaseModelError, match=r"lacks .*weights"):
        load(resolve("shapes.safetensors"), torch.float32)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_vae_file_in_the_original_layout_replaces_the_models_own(
    bundled: ResolvedModel, resolve: Resolve, tmp_path: Path, prefix
):
    vae = load_vae(bundled, torch.float16)
    write_checkpoint(tmp_path / "vae.safetensors", vae_tensors(vae, prefix))
    model = resolve(BUNDLED_NAME, vae="vae.safetensors")
    assert_same_weights(load_vae(model, torch.float32), load_vae(bundled, torch.float32))


def config_of(component: str) -> dict:
    return json.loads((SDXL_BASE_CONFIGS / component / "config.json").read_text())


def test_packaged_configurations_are_sdxl_bases():
    """Compare the parameter counts with those of the released model's files."""
    with init_empty_weights():
        models = {
            "unet": UNet2DConditionModel.from_config(config_of("unet")),
            "vae": AutoencoderKL.from_config(config_of("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config_of("text_encoder"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**config_of("text_encoder_2"))),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert models["vae"].config.scaling_factor == 0.13025
    assert models["vae"].config.force_upcast


def test_original_names_match_sdxl_base_on_the_meta_device():
    """sd_xl_base_1.0.safetensors has 1680 and 248 tensors under these prefixes; each corresponds to one of diffusers' model."""
    with init_empty_weights(include_buffers=True):
        unet = UNet2DConditionModel.from_config(config_of("unet"))
        vae = AutoencoderKL.from_config(config_of("vae"))
    for model, tensors, convert, count in (
        (unet, unet_tensors(unet), convert_ldm_unet_checkpoint, 1680),
        (vae, vae_tensors(vae), convert_ldm_vae_checkpoint, 248),
    ):
        assert len(tensors) == count
        converted = convert(dict(tensors), model.config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.squeeze().shape for name, tensor in converted.items()} == {
            name: torch.Size(size for size in shape if size != 1) for name, shape in shapes.items()
        }


def test_written_layout_has_names_of_sdxl_base(tensors):
    """Check some names of sd_xl_base_1.0.safetensors."""
    for name in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    ):
        assert name in tensors


def test_written_layout_keeps_the_bundled_weights(tensors):
    stored = load_file(BUNDLED_MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["conv_in.weight"], tensors["model.diffusion_model.input_blocks.0.0.weight"])
