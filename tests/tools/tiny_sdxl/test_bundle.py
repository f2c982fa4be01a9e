"""Tests of the bundled weights: they load through their consumers' loaders and reach the metrics of their card."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

from sdxl_pipeline.demo.render import render, to_image
from sdxl_pipeline.demo.shape_captions import canonical_caption
from sdxl_pipeline.demo.shape_world import held_out_specs, sample_plain
from tools.tiny_sdxl.bundle import BUNDLE, FOLDERS, bundle_bytes
from tools.tiny_sdxl.sample_shapes import measure_generation
from tools.tiny_sdxl.train_clip import CaptionIds, measure_clip
from tools.tiny_sdxl.train_taesd import measure_taesd
from tools.tiny_sdxl.train_vae import measure_vae


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    """Return the bundled pipeline in fp32."""
    loaded = StableDiffusionXLPipeline.from_pretrained(BUNDLE / "model", torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def shipped_files() -> list[Path]:
    """Return every shipped file."""
    return [file for name in FOLDERS for file in (BUNDLE / name).rglob("*") if file.is_file()]


def test_bundle_files_are_safetensors_and_text_within_size_limit() -> None:
    assert {file.suffix for file in shipped_files()} <= {".safetensors", ".json", ".txt"}
    assert not [file.name for file in shipped_files() if "fp16" in file.name]
    assert bundle_bytes() <= 24e6


def test_bundle_weights_are_half_precision() -> None:
    from safetensors import safe_open

    for file in shipped_files():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}, file


def test_bundle_pipeline_has_every_component_of_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    unet = pipeline.unet.config
    assert unet.addition_embed_type == "text_time"
    assert unet.projection_class_embeddings_input_dim == 6 * unet.addition_time_embed_dim + 64
    assert len(pipeline.tokenizer) == len(pipeline.tokenizer_2) == 1024
    assert pipeline.tokenizer.pad_token != pipeline.tokenizer_2.pad_token
    assert pipeline.config.force_zeros_for_empty_prompt
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert pipeline.vae_scale_factor == 8
    assert pipeline.vae.config.force_upcast is False
    assert pipeline.vae.config.scaling_factor not in (0.13025, 0.18215)


def test_vae_scaled_latents_have_unit_variance(pipeline: StableDiffusionXLPipeline) -> None:
    import random

    rng = random.Random(5)
    images = render([sample_plain(rng) for _ in range(32)], (128, 128), rng)
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.mean().abs() < 0.2
    assert 0.8 < latents.std() < 1.2


def test_vae_held_out_and_foreign_images_are_reconstructed() -> None:
    vae = AutoencoderKL.from_pretrained(BUNDLE / "model" / "vae", torch_dtype=torch.float32)
    metrics = measure_vae(vae, count=24)
    assert metrics["psnr_world_db"] >= 30
    assert metrics["psnr_unlike_db"] >= 24
    tiny = AutoencoderTiny.from_pretrained(BUNDLE / "taesd", torch_dtype=torch.float32)
    assert measure_taesd(tiny, vae, count=16)["preview_psnr_world_db"] >= 24


def test_clip_held_out_captions_retrieve_their_images() -> None:
    clip = CLIPModel.from_pretrained(BUNDLE / "clip", dtype=torch.float32)
    ids = CaptionIds(CLIPTokenizerFast.from_pretrained(BUNDLE / "clip"))
    assert measure_clip(clip, ids, count=256)["retrieval_top1"] >= 0.9


def test_clip_loaded_by_transformers_ranks_matching_image_first() -> None:
    clip = CLIPModel.from_pretrained(BUNDLE / "clip", dtype=torch.float32)
    processor = CLIPImageProcessorPil.from_pretrained(BUNDLE / "clip")
    tokenizer = CLIPTokenizerFast.from_pretrained(BUNDLE / "clip")
    specs = held_out_specs(8, seed=3)
    images: list[Image.Image] = [to_image(image) for image in render(specs, (96, 160), None)]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    text = tokenizer(
        [canonical_caption(s, include_centre=True) for s in specs], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = clip(pixel_values=pixel_values, **text).logits_per_text
    assert (logits.argmax(1) == torch.arange(8)).sum() >= 7


@pytest.mark.slow
def test_pipeline_held_out_prompts_are_followed(pipeline: StableDiffusionXLPipeline) -> None:
    metrics = measure_generation(pipeline, count=16)
    assert metrics["drawn_color"] >= 15 / 16
    assert metrics["drawn_background"] >= 15 / 16
    assert metrics["drawn_shape"] >= 12 / 16


def test_card_states_recorded_metrics() -> None:
    held_out = json.loads((BUNDLE / "figures.json").read_text())["held_out"]
    card = (BUNDLE / "README.md").read_text()
    assert f"{held_out['psnr_world_db']:.1f} dB" in card
    assert f"{100 * held_out['retrieval_top1']:.1f} %" in card
    assert held_out["psnr_world_db"] >= 30
    assert held_out["psnr_unlike_db"] >= 24
    assert held_out["retrieval_top1"] >= 0.9
    assert held_out["drawn_color"] >= 0.95
    assert held_out["drawn_background"] >= 0.95
    assert held_out["drawn_shape"] >= 0.8
    assert held_out["bytes"] == bundle_bytes()
