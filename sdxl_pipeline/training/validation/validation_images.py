"""Validation images, generated during training from the same seeds at every step unless randomized."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont

from sdxl_pipeline.config.schema.validation import ValidationSettings
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.sampling import build_inference_pipeline, image_from_pixels, sample_image
from sdxl_pipeline.runtime.specs import ValidationImage, ValidationPrompt
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.optim.ema import EMA_LABEL
from sdxl_pipeline.training.rng import derive_seed
from sdxl_pipeline.training.validation.image_file_names import distinct_names, distinct_stems, file_stem
from sdxl_pipeline.training.validation.previews import Previews

MAX_COLUMNS = 9
CELL = 256  # longest edge of an image, pixels
MARGIN = 12
HEADER = 30
LABEL_WIDTH = 200
FONT_SIZE = 15
INK, PAPER, FAINT = (34, 34, 34), (255, 255, 255), (120, 120, 120)


def write_validation_grid(images: Sequence[ValidationImage], path: Path) -> None:
    """Write a PNG with a row per image name and a column per step, at most MAX_COLUMNS, first and last step included."""
    steps = spread_evenly(sorted({image.step for image in images}), MAX_COLUMNS)
    names = list(dict.fromkeys(image.name for image in images))
    by_cell = {(image.name, image.step): image for image in images}
    font = ImageFont.load_default(FONT_SIZE)
    small = ImageFont.load_default(FONT_SIZE - 3)

    thumbnails = {
        cell: _thumbnail(by_cell[cell].path)
        for name in names
        for step in steps
        if (cell := (name, step)) in by_cell
    }
    width = max(thumbnail.width for thumbnail in thumbnails.values())
    heights = {
        name: max((image.height for (row, _), image in thumbnails.items() if row == name), default=0)
        for name in names
    }
    names = [name for name in names if heights[name]]

    grid = Image.new(
        "RGB",
        (
            LABEL_WIDTH + len(steps) * (width + MARGIN) + MARGIN,
            HEADER + sum(heights[name] + MARGIN for name in names) + MARGIN,
        ),
        PAPER,
    )
    canvas = ImageDraw.Draw(grid)
    for column, step in enumerate(steps):
        left = LABEL_WIDTH + column * (width + MARGIN)
        label = "before" if step == 0 else f"step {step}"
        canvas.text((left + width / 2, HEADER / 2 + 3), label, INK, font, anchor="mm")
    top = HEADER
    for name in names:
        prompt = next(image.prompt for image in images if image.name == name)
        canvas.multiline_text((MARGIN, top), textwrap.fill(name, 22), INK, font)
        title = canvas.multiline_textbbox((MARGIN, top), textwrap.fill(name, 22), font)
        max_lines = max(1, int((heights[name] - (title[3] - top) - 8) // (FONT_SIZE + 1)))
        lines = textwrap.wrap(prompt, 28)
        text = "\n".join(
            lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1][:25] + "..."]
        )
        canvas.multiline_text((MARGIN, title[3] + 8), text, FAINT, small)
        for column, step in enumerate(steps):
            if (name, step) in thumbnails:
                grid.paste(thumbnails[name, step], (LABEL_WIDTH + column * (width + MARGIN), top))
        top += heights[name] + MARGIN
    with atomic_path(path) as temporary:
        grid.save(temporary, format="PNG")


def spread_evenly(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly spaced, the first and the last included."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _thumbnail(path: str) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return small


UNCONDITIONAL = ValidationPrompt(name="unconditional", prompt="")
"""The prompt that validation_disable_unconditional removes."""


@dataclass(frozen=True)
class PlannedImage:
    """One image to generate at every validation."""

    name: str  # of its row in the validation grid
    stem: str  # of its file
    prompt: ValidationPrompt
    size: tuple[int, int]  # (height, width), pixels
    seed: int


def plan_images(
    prompts: Sequence[ValidationPrompt], settings: ValidationSettings, seed: int, step: int
) -> list[PlannedImage]:
    """Return an image per prompt, size and seed: `num_validation_images` successive seeds from `seed`, other ones at each step if randomized."""
    sizes = settings.validation_sizes
    first_seed = derive_seed(seed, "validation", step) % 2**32 if settings.validation_randomize else seed
    prompts = prompts if settings.validation_disable_unconditional else (*prompts, UNCONDITIONAL)
    images = []
    for prompt in prompts:
        for height, width in sizes:
            for number in range(settings.num_validation_images):
                size = [f"{width}x{height}"] if len(sizes) > 1 else []
                count = [str(number + 1)] if settings.num_validation_images > 1 else []
                name = " ".join([prompt.name, *size, *count])
                stem = "_".join([file_stem(prompt.name), *size, *count])
                images.append(PlannedImage(name, stem, prompt, (height, width), first_seed + number))
    names = distinct_names([image.name for image in images], EMA_LABEL)
    stems = distinct_stems([image.stem for image in images], _stem_suffix(EMA_LABEL))
    return [
        replace(image, name=name, stem=stem) for image, name, stem in zip(images, names, stems, strict=True)
    ]


@dataclass(frozen=True)
class ImageGenerator:
    """Generates the validation images of a run into `folder`.

    No text encoder is loaded: prompt embeddings come from the text cache, or from the text encoders in training, through `reader`.
    """

    base_model: ResolvedModel
    vae_dtype: torch.dtype
    prompts: Sequence[ValidationPrompt]
    settings: ValidationSettings
    seed: int  # of the first image of a prompt
    scheduler_changes: Mapping[str, Any]  # of the training
    reader: BatchReader
    folder: Path
    previews: Previews | None = None

    def generate(
        self,
        unet: UNet2DConditionModel,
        step: int,
        label: str = "",
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[ValidationImage]:
        """Generate the planned images one by one with the current weights of `unet`, write them and yield them.

        `label` is appended to their names when other weights of the same step generate them as well. `on_step` is called after every
        sampler step and may raise to end the generation. Nothing that the training computes with is changed; the UNet is in eval mode only
        while an image is generated.
        """
        pipeline = build_inference_pipeline(
            self.base_model, unet, self.vae_dtype, self.settings, self.scheduler_changes
        )
        zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
        for image in plan_images(self.prompts, self.settings, self.seed, step):
            name, prompt = image.name + label, image.prompt.prompt
            stem = image.stem + _stem_suffix(label)
            previews = self.previews
            on_preview = None if previews is None else previews.callback_for(name, stem, prompt, step)
            conditioning = self.reader.conditioning(prompt, image.prompt.negative_prompt, zeros)
            was_training = unet.training
            unet.eval()
            try:
                pixels = sample_image(
                    pipeline, conditioning, image.size, image.seed, self.settings, on_step, on_preview
                )
            finally:
                unet.train(was_training)
            path = self.folder / f"step-{step:08d}" / f"{stem}.png"
            with atomic_path(path) as temporary:
                image_from_pixels(pixels).save(temporary, format="PNG")
            yield ValidationImage(step=step, name=name, prompt=prompt, path=str(path), seed=image.seed)


def _stem_suffix(label: str) -> str:
    return f"_{file_stem(label)}" if label else ""
