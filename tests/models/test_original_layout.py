"""Original layout: names, shapes and values of SDXL's original single-file checkpoints."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.base_model import BUNDLED_MODEL, SDXL_BASE_CONFIGS, ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders, load_unet, load_vae
from sdxl_pipeline.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    unet_tensors,
    vae_tensors,
)
from tests.models import original_layout as independent

BASE_NAMES_AND_SHAPES = "2086c2ba91745f921763779e5e7d19ed40cf689f25c1dd929bb509a000f8cb6e"
"""SHA-256 of the lines "name [shape]" of sd_xl_base_1.0.safetensors, sorted, as sd-mecha's model configuration sdxl-sgm lists them."""


def sdxl_base() -> dict[str, nn.Module]:
    folder = Path(SDXL_BASE_CONFIGS)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder, subfolder="unet")
            ),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder")),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
            ),
        }


def original(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        **dict(unet_tensors(models["unet"].state_dict(), models["unet"].config)),
        **dict(vae_tensors(models["vae"].state_dict())),
        **dict(first_text_tensors(models["text_encoder"].state_dict())),
        **dict(second_text_tensors(models["text_encoder_2"].state_dict())),
    }


def test_original_layout_has_the_2515_names_and_shapes_of_sdxl_base():
    tensors = original(sdxl_base())
    assert len(tensors) == 2515
    lines = [f"{name} {list(tensors[name].shape)}\n" for name in sorted(tensors)]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == BASE_NAMES_AND_SHAPES


def test_original_layout_equals_an_independent_writer(bundled: ResolvedModel):
    encoders = load_text_encoders(bundled, torch.float16)
    models = {
        "unet": load_unet(bundled, torch.float16),
        "vae": load_vae(bundled, torch.float16),
        "text_encoder": encoders.text_encoder,
        "text_encoder_2": encoders.text_encoder_2,
    }
    tensors = original(models)
    expected = {
        **independent.unet_tensors(models["unet"]),
        **independent.vae_tensors(models["vae"]),
        **independent.first_text_tensors(models["text_encoder"]),
        **independent.second_text_tensors(models["text_encoder_2"]),
    }
    assert tensors.keys() - expected.keys() == {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    }
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.attentions.0.proj_in.weight",
        "down_blocks.2.downsamplers.0.conv.weight",
        "up_blocks.2.attentions.0.proj_in.weight",
        "down_blocks.0.resnets.0.norm3.weight",
        "down_blocks.3.resnets.0.conv1.weight",
        "encoder_hid_proj.weight",
    ],
)
def test_unet_tensors_of_an_unknown_module_raise(name: str):
    with pytest.raises(KeyError):
        dict(unet_tensors({name: torch.zeros(1)}, UNet2DConditionModel.load_config(BUNDLED_MODEL / "unet")))
