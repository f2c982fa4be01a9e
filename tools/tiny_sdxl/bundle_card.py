"""Evaluation of the shipped bundle and its model card; every number in the card is computed."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizerFast

from sdxl_pipeline.demo.shape_world import COLORS, PLACES, SHAPES, SIZES
from tools.tiny_sdxl.bundle import BUNDLE, bundle_bytes
from tools.tiny_sdxl.sample_shapes import GUIDANCE, STEPS, measure_generation
from tools.tiny_sdxl.shape_batches import RICH_SHARE
from tools.tiny_sdxl.train_clip import CaptionIds, measure_clip
from tools.tiny_sdxl.train_taesd import measure_taesd
from tools.tiny_sdxl.train_vae import measure_vae

GENERATED = 64
RETRIEVED = 256
RECONSTRUCTED = 64

Metrics = dict[str, float]


def measure_bundle(bundle: Path = BUNDLE) -> Metrics:
    """Return the held-out metrics of the shipped fp16 weights, computed in fp32."""
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
        **measure_generation(pipeline, GENERATED),
        "unet_parameters": _parameters(pipeline.unet),
        "vae_parameters": _parameters(vae),
        "clip_parameters": _parameters(clip),
        "bytes": bundle_bytes(bundle),
    }


def write_model_card(bundle: Path, metrics: Metrics, trainings: dict[str, dict[str, Any]]) -> None:
    """Write README.md and figures.json into `bundle`. `trainings` has steps and seconds of each part."""
    (bundle / "figures.json").write_text(
        json.dumps({"held_out": metrics, "trainings": trainings}, indent=2, sort_keys=True) + "\n"
    )
    (bundle / "README.md").write_text(_card(metrics, trainings))


def _parameters(model: torch.nn.Module | UNet2DConditionModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _card(metrics: Metrics, trainings: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            f"VAE reconstruction, {RECONSTRUCTED} held-out images of the world",
            _db(metrics["psnr_world_db"]),
        ),
        (f"VAE reconstruction, {RECONSTRUCTED} images unlike the world", _db(metrics["psnr_unlike_db"])),
        (
            f"tiny decoder, {RECONSTRUCTED} held-out images of the world",
            _db(metrics["preview_psnr_world_db"]),
        ),
        (f"text-to-image retrieval, top-1 among {RETRIEVED} held-out", _percent(metrics["retrieval_top1"])),
    ]
    rows += [
        (
            f"{GENERATED} held-out prompts, images of {STEPS} Euler steps at guidance {GUIDANCE:g}: correct {name}",
            _percent(share),
        )
        for name, share in (
            ("background", metrics["drawn_background"]),
            ("colour", metrics["drawn_color"]),
            ("shape", metrics["drawn_shape"]),
            ("size", metrics["drawn_size"]),
            ("place", metrics["drawn_place"]),
        )
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    trained = "\n".join(
        f"| {part} | {record['steps']:,} | {record['seconds']:,} s |"
        for part, record in trainings.items()
        if "steps" in record
    )
    notes = "".join(f"\n\n{part}: {record['note']}" for part, record in trainings.items() if "note" in record)
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-sdxl

A Stable Diffusion XL small enough to ship with the code: every component of the real pipeline, trained from
scratch on images of a procedural renderer. It serves the demo, the tests and the benchmarks on a CPU. It
generates coloured shapes and nothing else.

- `model/`: a diffusers folder for `StableDiffusionXLPipeline.from_pretrained` (fp16 safetensors). UNet
  {metrics["unet_parameters"] / 1e6:.2f} M parameters, VAE {metrics["vae_parameters"] / 1e6:.2f} M.
- `clip/`: the CLIP for CLIP scores, {metrics["clip_parameters"] / 1e6:.2f} M parameters.
- `taesd/`: an AutoencoderTiny for fast previews of latents.

Total size: {metrics["bytes"] / 1e6:.1f} MB.

## The world
- {len(SHAPES)} shapes: {", ".join(SHAPES)}
- {len(COLORS)} colours, for shape and background: {", ".join(COLORS)}
- {len(SIZES)} sizes, {len(PLACES)} places; images of 128x128, 160x96 and 96x160

Of the UNet's training images {RICH_SHARE:.0%} are richer: outlines, stripes, dots, a smaller shape inside, one
or two eyes, free-form silhouettes under invented words, and some abstract art. An example:
"{_EXAMPLE}".

A twelfth of the (shape, colour, background) triples is in no training image; the metrics below are measured on those.

## Held-out metrics
| metric | value |
|---|---|
{table}

Measured on the shipped weights by `python -m tools.tiny_sdxl.train_bundle --only card`, also in figures.json.

## Training
| part | steps | wall time |
|---|---|---|
{trained}

`python -m tools.tiny_sdxl.train_bundle` on two CPU cores ({_processor()}): VAE, then tiny decoder, in parallel
with CLIP and the text encoders; then the UNet in two processes. Each training is limited by wall time, so
another machine gives other weights of the same kind.{notes}

## Limits
It does not generate photographs, people or text. Words outside the captions of the world have no meaning until a
LoRA is trained on them. Image sizes far from 128x128 pixels are outside the training distribution.
"""


_EXAMPLE = "a large red and white striped heart with a black outline on a blue background"


def _db(value: float) -> str:
    return f"{value:.1f} dB"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _processor() -> str:
    """Return the processor's name from Linux, or else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
