"""The gallery: each prompt drawn by the base model and by the LoRA from the same noise, and the check that no picture is broken."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.specs import TrainingLane, ValidationPrompt
from sdxl_pipeline.sdxl.latents import decode
from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.training.batches import BatchReader
from sdxl_pipeline.training.samples import Sample

MAX_CAPTION_PROMPTS = 4
"""Captions drawn when the project has no validation prompt."""

BLACK_LEVEL = 2 / 255
"""A picture none of whose values lies above this is black."""

CONSTANT_DEVIATION = 1 / 255
"""A picture whose colours deviate less than this from their mean, as a standard deviation per channel, shows nothing."""


@dataclass(frozen=True)
class Shot:
    """One picture to draw. Embeddings have a batch dimension of 1."""

    name: str  # of the picture's file
    prompt: str
    height: int
    width: int
    seed: int
    prompt_embeds: Tensor  # (1, 77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (1, C2)
    negative_prompt_embeds: Tensor | None  # None: what the base model's pipeline takes for no negative prompt
    negative_pooled_prompt_embeds: Tensor | None


@dataclass(frozen=True)
class Drawing:
    """A picture as the pipeline drew it, (H, W, 3) float32 in [0, 1] unless it is broken, and the fault found in it."""

    shot: Shot
    pixels: np.ndarray
    fault: str | None

    @property
    def image(self) -> Image.Image:
        """The picture in 8 bits; a value that is not a number shows black."""
        return Image.fromarray((np.nan_to_num(self.pixels) * 255).round().clip(0, 255).astype(np.uint8))

    def save(self, folder: Path) -> Path:
        """Write the picture as a PNG named after its shot."""
        path = folder / f"{self.shot.name}.png"
        with atomic_path(path) as temporary:
            self.image.save(temporary, format="PNG")
        return path


def plan_shots(
    prompts: Sequence[ValidationPrompt],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[Shot]:
    """Every prompt at every validation size and seed. Raises StageError for a prompt that was not encoded.

    `zeros_for_empty_prompt` is the base model's `force_zeros_for_empty_prompt`: without a negative prompt the pipeline then takes
    zeros, else the encoded empty prompt.
    """
    shots = []
    for prompt in prompts:
        negative = _negative(prompt.negative_prompt, reader, zeros_for_empty_prompt)
        shots += _shots(prompt.name, prompt.prompt, settings, reader.prompt_embeds(prompt.prompt), negative)
    return _with_unique_names(shots)


def plan_caption_shots(
    samples: Sequence[Sample],
    lanes: Sequence[TrainingLane],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[Shot]:
    """For a project without prompts: the first few distinct captions of its pictures, without a negative prompt."""
    captions: dict[str, str] = {}
    for lane in lanes:
        table = pd.read_parquet(lane.text_embeds.entries_path, columns=["embed_key", "caption"])
        captions.update(zip(table["embed_key"], table["caption"], strict=True))
    distinct = {captions[sample.embed_keys[0]]: sample for sample in reversed(samples)}
    shots = []
    for number, (caption, sample) in enumerate(sorted(distinct.items())[:MAX_CAPTION_PROMPTS]):
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        embeds = (texts.prompt_embeds, texts.pooled_prompt_embeds)
        negative = _negative("", reader, zeros_for_empty_prompt)
        shots += _shots(f"caption_{number}", caption, settings, embeds, negative)
    return _with_unique_names(shots)


@torch.no_grad()
def draw(
    pipeline: StableDiffusionXLPipeline,
    shot: Shot,
    settings: TrainingSettings,
    on_step: Callable[[], None] | None = None,
) -> Drawing:
    """Draw one picture with the validation settings; its noise comes from the CPU, so a seed means the same on every device."""

    def after_step(
        _pipeline: object, _step: int, _timestep: int, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if on_step is not None:
            on_step()
        return tensors

    def on_device(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(pipeline.unet.device, pipeline.unet.dtype)

    latents = pipeline(
        prompt_embeds=on_device(shot.prompt_embeds),
        pooled_prompt_embeds=on_device(shot.pooled_prompt_embeds),
        negative_prompt_embeds=on_device(shot.negative_prompt_embeds),
        negative_pooled_prompt_embeds=on_device(shot.negative_pooled_prompt_embeds),
        height=shot.height,
        width=shot.width,
        num_inference_steps=settings.validation_num_inference_steps,
        guidance_scale=settings.validation_guidance,
        guidance_rescale=settings.validation_guidance_rescale,
        generator=torch.Generator("cpu").manual_seed(shot.seed),
        callback_on_step_end=after_step,
        output_type="latent",
    ).images
    # Decoded here, so that the VAE may keep a precision of its own and a NaN is seen before it is rounded away.
    pixels = decode(pipeline.vae, latents)[0].permute(1, 2, 0).cpu().numpy()
    return Drawing(shot, pixels, find_fault(pixels))


def find_fault(pixels: np.ndarray) -> str | None:
    """What is wrong with a picture of values in [0, 1], (H, W, 3): "not finite", "black" or "constant"; None when nothing is."""
    if not np.isfinite(pixels).all():
        return f"not finite: {(~np.isfinite(pixels)).mean():.0%} of its values are NaN or infinite"
    if pixels.max() <= BLACK_LEVEL:
        return "black"
    if pixels.std(axis=(0, 1)).max() < CONSTANT_DEVIATION:
        return "constant: one colour all over"
    return None


def _negative(
    prompt: str, reader: BatchReader, zeros_for_empty_prompt: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not prompt and zeros_for_empty_prompt:
        return None, None
    return reader.prompt_embeds(prompt)


def _shots(
    name: str,
    prompt: str,
    settings: TrainingSettings,
    embeds: tuple[Tensor, Tensor],
    negative: tuple[Tensor | None, Tensor | None],
) -> list[Shot]:
    sizes = settings.validation_sizes
    seeds = range(
        settings.effective_validation_seed,
        settings.effective_validation_seed + settings.num_validation_images,
    )
    return [
        Shot(
            name="_".join(
                [_file_stem(name)]
                + ([f"{width}x{height}"] if len(sizes) > 1 else [])
                + ([f"seed{seed}"] if len(seeds) > 1 else [])
            ),
            prompt=prompt,
            height=height,
            width=width,
            seed=seed,
            prompt_embeds=embeds[0],
            pooled_prompt_embeds=embeds[1],
            negative_prompt_embeds=negative[0],
            negative_pooled_prompt_embeds=negative[1],
        )
        for height, width in sizes
        for seed in seeds
    ]


def _file_stem(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name).strip("_")[:80] or "prompt"


def _with_unique_names(shots: Sequence[Shot]) -> list[Shot]:
    """Names that differ only in characters no file name holds get a number, so that no picture overwrites another."""
    unique: dict[str, Shot] = {}
    for shot in shots:
        name, number = shot.name, 2
        while name.lower() in unique:
            name, number = f"{shot.name}_{number}", number + 1
        unique[name.lower()] = replace(shot, name=name)
    return list(unique.values())
