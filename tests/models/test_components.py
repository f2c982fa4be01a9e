"""Components are loaded frozen, in the requested dtype and complete; unsafe ones raise an error."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import (
    latent_scaling_factor,
    load_noise_scheduler,
    load_pipeline,
    load_text_encoders,
    load_unet,
    load_vae,
)
from sdxl_pipeline.models.model_files import BaseModelError
from tests.models.conftest import Resolve


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_components_are_frozen_in_eval_mode_and_dtype(bundled: ResolvedModel, dtype):
    encoders = load_text_encoders(bundled, dtype)
    for module in (
        load_unet(bundled, dtype),
        load_vae(bundled, dtype),
        encoders.text_encoder,
        encoders.text_encoder_2,
    ):
        assert not module.training
        assert all(p.dtype == dtype and not p.requires_grad and not p.is_meta for p in module.parameters())


def test_load_vae_with_force_upcast_raises_only_in_fp16(resolve: Resolve, copy: Path):
    edit(copy / "vae" / "config.json", force_upcast=True)
    model = resolve("copy")
    with pytest.raises(BaseModelError, match=r"copy overflows in fp16.*vae_dtype to bf16"):
        load_vae(model, torch.float16)
    assert load_vae(model, torch.bfloat16).dtype == torch.bfloat16
    edit(copy / "vae" / "config.json", force_upcast=False)
    assert load_vae(resolve("copy"), torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    "values", [{"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, {"shift_factor": 0.1}]
)
def test_load_vae_with_another_normalization_raises(resolve: Resolve, copy: Path, values):
    edit(copy / "vae" / "config.json", **values)
    with pytest.raises(BaseModelError, match="Use a VAE of SDXL"):
        load_vae(resolve("copy"), torch.float32)


@pytest.mark.parametrize(
    ("part", "load"),
    [
        ("unet", load_unet),
        ("vae", load_vae),
        ("text_encoder", load_text_encoders),
        ("text_encoder_2", load_text_encoders),
    ],
)
def test_load_with_a_missing_weight_raises(resolve: Resolve, copy: Path, part, load):
    path = next((copy / part).glob("*.safetensors"))
    tensors = load_file(path)
    dropped = next(name for name in sorted(tensors) if name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match="lacks 1 weights"):
        load(resolve("copy"), torch.float32)


def test_load_noise_scheduler_has_sdxls_betas(bundled: ResolvedModel):
    scheduler = load_noise_scheduler(bundled)
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.prediction_type == "epsilon"
    # scaled linear from 0.00085 to 0.012: the last alpha-bar of Stable Diffusion
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466009, rel=1e-4)
    assert scheduler.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, rel=1e-6)


def test_latent_scaling_factor_is_that_of_the_vae_in_use(
    bundled: ResolvedModel, resolve: Resolve, copy: Path
):
    assert latent_scaling_factor(bundled) == load_vae(bundled, torch.float32).config.scaling_factor
    edit(copy / "vae" / "config.json", scaling_factor=0.5)
    assert latent_scaling_factor(resolve("copy")) == 0.5
    assert latent_scaling_factor(resolve("bundled:tiny-sdxl", vae="copy/vae")) == 0.5
    config = json.loads((copy / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    assert (
        latent_scaling_factor(resolve("copy"))
        == load_vae(resolve("copy"), torch.float32).config.scaling_factor
    )


def test_load_pipeline_uses_given_components_and_loads_the_rest(bundled: ResolvedModel):
    unet = load_unet(bundled, torch.float32)
    pipeline = load_pipeline(bundled, torch.float32, unet=unet, text_encoders=False)
    assert pipeline.unet is unet
    assert pipeline.text_encoder is None
    assert pipeline.vae is not None
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    embeds = {"prompt_embeds": torch.zeros(1, 77, 128), "pooled_prompt_embeds": torch.zeros(1, 64)}
    image = pipeline(**embeds, num_inference_steps=1, height=64, width=96, guidance_scale=1.0).images[0]
    assert image.size == (96, 64)


def test_load_pipeline_with_an_unknown_scheduler_class_raises(resolve: Resolve, copy: Path):
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="os")
    with pytest.raises(BaseModelError, match="'os' is not a scheduler class of diffusers"):
        load_pipeline(resolve("copy"), torch.float32)
