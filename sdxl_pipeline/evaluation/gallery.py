"""The gallery: each prompt drawn by the base model and by the LoRA from the same noise, and the check that no image is broken."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.sampling import Conditioning, image_from_pixels, sample_image
from sdxl_pipeline.runtime.specs import TrainingDataset, ValidationPrompt
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.validation.image_file_names import distinct_stems, file_stem

MAX_CAPTION_PROMPTS = 4
"""Captions drawn when the project has no validation prompt."""

BLACK_LEVEL = 2 / 255
"""An image none of whose values lies above this is black."""

CONSTANT_DEVIATION = 1 / 255
"""An image whose colours deviate less than this from their mean, as a standard deviation per channel, shows nothing."""


@dataclass(frozen=True)
class GalleryPrompt:
    """One image to draw."""

    name: str  # of the image's file
    prompt: str
    height: int
    width: int
    seed: int
    conditioning: Conditioning


@dataclass(frozen=True)
class GalleryImage:
    """An image as the pipeline drew it, (H, W, 3) float32 in [0, 1] unless it is broken, and the fault found in it."""

    shot: GalleryPrompt
    pixels: np.ndarray
    fault: str | None

    @property
    def image(self) -> Image.Image:
        """The image in 8 bits; a value that is not a number shows black."""
        return image_from_pixels(self.pixels)

    def save(self, folder: Path) -> Path:
        """Write the image as a PNG named after its shot."""
        path = folder / f"{self.shot.name}.png"
        with atomic_path(path) as temporary:
            self.image.save(temporary, format="PNG")
        return path


def plan_gallery(
    prompts: Sequence[ValidationPrompt],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[GalleryPrompt]:
    """Every prompt at every validation size and seed. Raises UserError for a prompt that was not encoded.

    `zeros_for_empty_prompt` is the base model's `force_zeros_for_empty_prompt`: without a negative prompt the pipeline then takes
    zeros, else the encoded empty prompt.
    """
    shots = []
    for prompt in prompts:
        conditioning = reader.conditioning(prompt.prompt, prompt.negative_prompt, zeros_for_empty_prompt)
        shots += _shots(prompt.name, prompt.prompt, settings, conditioning)
    return _with_unique_names(shots)


def plan_caption_gallery(
    samples: Sequence[Sample],
    datasets: Sequence[TrainingDataset],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[GalleryPrompt]:
    """For a project without prompts: the first few distinct captions of its images, without a negative prompt."""
    captions: dict[str, str] = {}
    for dataset in datasets:
        table = pd.read_parquet(dataset.text_embeds.entries_path, columns=["embed_key", "caption"])
        captions.update(zip(table["embed_key"], table["caption"], strict=True))
    distinct = {captions[sample.embed_keys[0]]: sample for sample in reversed(samples)}
    shots = []
    for number, (caption, sample) in enumerate(sorted(distinct.items())[:MAX_CAPTION_PROMPTS]):
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        negative = () if zeros_for_empty_prompt else reader.prompt_embeds("")
        conditioning = Conditioning(texts.prompt_embeds, texts.pooled_prompt_embeds, *negative)
        shots += _shots(f"caption_{number}", caption, settings, conditioning)
    return _with_unique_names(shots)


def draw(
    pipeline: StableDiffusionXLPipeline,
    shot: GalleryPrompt,
    settings: TrainingSettings,
    on_step: Callable[[], None] | None = None,
) -> GalleryImage:
    """Draw one image with the validation settings, and look whether it is broken."""
    pixels = sample_image(
        pipeline, shot.conditioning, (shot.height, shot.width), shot.seed, settings, on_step
    )
    return GalleryImage(shot, pixels, find_defect(pixels))


def find_defect(pixels: np.ndarray) -> str | None:
    """What is wrong with an image of values in [0, 1], (H, W, 3): "not finite", "black" or "constant"; None when nothing is."""
    if not np.isfinite(pixels).all():
        return f"not finite: {(~np.isfinite(pixels)).mean():.0%} of its values are NaN or infinite"
    if pixels.max() <= BLACK_LEVEL:
        return "black"
    if pixels.std(axis=(0, 1)).max() < CONSTANT_DEVIATION:
        return "constant: one colour all over"
    return None


def _shots(
    name: str,
    prompt: str,
    settings: TrainingSettings,
    conditioning: Conditioning,
) -> list[GalleryPrompt]:
    sizes = settings.validation_sizes
    seeds = range(
        settings.effective_validation_seed,
        settings.effective_validation_seed + settings.num_validation_images,
    )
    return [
        GalleryPrompt(
            name="_".join(
                [file_stem(name)]
                + ([f"{width}x{height}"] if len(sizes) > 1 else [])
                + ([f"seed{seed}"] if len(seeds) > 1 else [])
            ),
            prompt=prompt,
            height=height,
            width=width,
            seed=seed,
            conditioning=conditioning,
        )
        for height, width in sizes
        for seed in seeds
    ]


def _with_unique_names(shots: Sequence[GalleryPrompt]) -> list[GalleryPrompt]:
    """No image overwrites another."""
    names = distinct_stems(shot.name for shot in shots)
    return [replace(shot, name=name) for shot, name in zip(shots, names, strict=True)]
