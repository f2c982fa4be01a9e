"""Assembly of trained parts into the folders that are shipped: model/, clip/ and taesd/, in fp16 safetensors."""

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
)

from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from tools.tiny_sdxl.architecture import (
    CLIP_IMAGE_SIZE,
    build_clip,
    build_first_text_encoder,
    build_scheduler,
    build_tiny_autoencoder,
    build_unet,
    build_vae,
)

BUNDLE = BUNDLED_MODEL.parent
FOLDERS = ("model", "clip", "taesd")


def save_untrained_parts(parts: Path, seed: int = 0) -> None:
    """Write every missing component into `parts`, with its initial weights."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(parts)
    clip = build_clip(tokenizer)
    components = {
        "vae": build_vae(),
        "taesd": build_tiny_autoencoder(),
        "clip": clip,
        "text_encoder": build_first_text_encoder(tokenizer),
        "text_encoder_2": second_text_encoder(clip),
        "unet": build_unet(),
    }
    for name, component in components.items():
        if not (parts / name).exists():
            component.save_pretrained(parts / name)
    save_image_processor(parts / "clip", tokenizer)


def load_tokenizer(parts: Path) -> CLIPTokenizerFast:
    """Return the tokenizer of the first text encoder."""
    return CLIPTokenizerFast.from_pretrained(parts / "tokenizer")


def second_text_encoder(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """Return the text tower of `clip` as SDXL's second text encoder, with its own memory."""
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    expected = encoder.state_dict()
    encoder.load_state_dict({name: value for name, value in clip.state_dict().items() if name in expected})
    return encoder


def save_image_processor(folder: Path, tokenizer: CLIPTokenizerFast) -> None:
    """Write the tokenizer and the image processor of the scoring CLIP; the processor needs Pillow only."""
    tokenizer.save_pretrained(folder)
    side = {"height": CLIP_IMAGE_SIZE, "width": CLIP_IMAGE_SIZE}
    CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def assemble(parts: Path, bundle: Path = BUNDLE) -> None:
    """Write model/, clip/ and taesd/ under `bundle` from `parts`; each folder is replaced atomically, by rename."""
    staged = bundle / f".assembling-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2"),
        tokenizer=CLIPTokenizerFast.from_pretrained(parts / "tokenizer"),
        tokenizer_2=CLIPTokenizerFast.from_pretrained(parts / "tokenizer_2"),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(staged / "model", safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(parts / name / file, staged / "model" / name / file)
    CLIPModel.from_pretrained(parts / "clip").half().save_pretrained(staged / "clip")
    save_image_processor(staged / "clip", load_tokenizer(parts))
    AutoencoderTiny.from_pretrained(parts / "taesd").half().save_pretrained(staged / "taesd")
    for written in staged.rglob("*"):
        if written.is_file():
            written.chmod(0o644)
    for name in FOLDERS:
        replaced = staged / f"old-{name}"
        if (bundle / name).exists():
            (bundle / name).rename(replaced)
        (staged / name).rename(bundle / name)
    shutil.rmtree(staged)


def bundle_bytes(bundle: Path = BUNDLE) -> int:
    """Return the size in bytes of the shipped files: weights, configs and tokenizers."""
    return sum(
        file.stat().st_size for name in FOLDERS for file in (bundle / name).rglob("*") if file.is_file()
    )
