"""Measures the bundle as it ships and writes its model card; no figure in the card is typed by hand."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizerFast

from sdxl_pipeline.demo.shape_world import COLORS, PLACES, SHAPES, SIZES
from tools.tiny_sdxl.bundle import BUNDLE, bundle_bytes
from tools.tiny_sdxl.sample_shapes import GUIDANCE, STEPS, measure_drawing
from tools.tiny_sdxl.shape_batches import RICH_SHARE
from tools.tiny_sdxl.train_clip import CaptionIds, measure_clip
from tools.tiny_sdxl.train_taesd import measure_taesd
from tools.tiny_sdxl.train_vae import measure_vae

DRAWN = 64
RETRIEVED = 256
RECONSTRUCTED = 64

Figures = dict[str, float]


def measure_bundle(bundle: Path = BUNDLE) -> Figures:
    """The held-out figures of the shipped fp16 weights, computed in fp32."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(bundle / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    vae = AutoencoderKL.from_pretrained(bundle / "model" / "vae", torch_dtype=torch.float32)
    tiny = AutoencoderTiny.from_pretrained(bundle / "taesd", torch_dtype=torch.float32)
    clip = CLIPModel.from_pretrained(bundle / "clip", dtype=torch.float32)
    ids = CaptionIds(CLIPTokenizerFast.from_pretrained(bundle / "clip"))
    return {
        **measure_vae(vae, RECONSTRUCTED),
        **measure_taesd(tiny, vae, RECONSTRUCTED),
        **measure_clip(clip, ids, RETRIEVED),
        **measure_drawing(pipeline, DRAWN),
        "unet_parameters": _parameters(pipeline.unet),
        "vae_parameters": _parameters(vae),
        "clip_parameters": _parameters(clip),
        "bytes": bundle_bytes(bundle),
    }


def write_model_card(bundle: Path, figures: Figures, trainings: dict[str, dict[str, Any]]) -> None:
    """Writes README.md and figures.json into `bundle`. `trainings`: steps and seconds of each part."""
    (bundle / "figures.json").write_text(
        json.dumps({"held_out": figures, "trainings": trainings}, indent=2, sort_keys=True) + "\n"
    )
    (bundle / "README.md").write_text(_card(figures, trainings))


def _parameters(model: torch.nn.Module | UNet2DConditionModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _card(figures: Figures, trainings: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            f"VAE reconstruction, {RECONSTRUCTED} held-out images of the world",
            _db(figures["psnr_world_db"]),
        ),
        (f"VAE reconstruction, {RECONSTRUCTED} images unlike the world", _db(figures["psnr_unlike_db"])),
        (
            f"tiny decoder, {RECONSTRUCTED} held-out images of the world",
            _db(figures["preview_psnr_world_db"]),
        ),
        (f"text-to-image retrieval, top-1 among {RETRIEVED} held-out", _percent(figures["retrieval_top1"])),
    ]
    rows += [
        (
            f"{DRAWN} held-out prompts drawn ({STEPS} Euler steps, guidance {GUIDANCE:g}): right {name}",
            _percent(share),
        )
        for name, share in (
            ("background", figures["drawn_background"]),
            ("colour", figures["drawn_color"]),
            ("shape", figures["drawn_shape"]),
            ("size", figures["drawn_size"]),
            ("place", figures["drawn_place"]),
        )
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    trained = "\n".join(
        f"| {part} | {figures_of['steps']:,} | {figures_of['seconds']:,} s |"
        for part, figures_of in trainings.items()
        if "steps" in figures_of
    )
    notes = "".join(f"\n\n{part}: {record['note']}" for part, record in trainings.items() if "note" in record)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sdxl

A Stable Diffusion XL small enough to ship with the code: every component of the real pipeline, trained from
scratch on images our own generator draws. It serves the demo, the tests and the benchmarks on a CPU. It knows
coloured shapes and nothing else.

- `model/`: a diffusers folder for `StableDiffusionXLPipeline.from_pretrained` (fp16 safetensors). UNet
  {figures["unet_parameters"] / 1e6:.2f} M parameters, VAE {figures["vae_parameters"] / 1e6:.2f} M.
- `clip/`: the CLIP that scores images against prompts, {figures["clip_parameters"] / 1e6:.2f} M parameters.
- `taesd/`: an AutoencoderTiny for quick previews of latents.

All folders together: {figures["bytes"] / 1e6:.1f} MB.

## The world
- {len(SHAPES)} shapes: {", ".join(SHAPES)}
- {len(COLORS)} colours, for shape and background: {", ".join(COLORS)}
- {len(SIZES)} sizes, {len(PLACES)} places; images of 128x128, 160x96 and 96x160

Of the UNet's training images {RICH_SHARE:.0%} are richer: outlines, stripes, dots, a smaller shape inside, one
or two eyes, free-form silhouettes under invented words, and some abstract art. An example:
"{_EXAMPLE}".

A twelfth of the (shape, colour, background) triples is in no training image; the figures are on those.

## Held-out figures
| what | measured |
|---|---|
{table}

Measured on the shipped weights by `python -m tools.tiny_sdxl.train_bundle --only card`, also in figures.json.

## Training
| part | steps | wall time |
|---|---|---|
{trained}

`python -m tools.tiny_sdxl.train_bundle` on two CPU cores ({_processor()}): VAE, then tiny decoder, beside
CLIP with the text encoders; then the UNet in two processes. The length of each training is set by the clock, so
another machine gives other weights of the same kind.{notes}

## Limits
It does not draw photographs, people or text. Words outside the captions of the world mean nothing to it until a
LoRA teaches them. Images far from 128x128 pixels are outside of what it has seen.
"""


_EXAMPLE = "a large red and white striped heart with a black outline on a blue background"


def _db(value: float) -> str:
    return f"{value:.1f} dB"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _processor() -> str:
    """The processor's name as Linux knows it, else what Python says."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
