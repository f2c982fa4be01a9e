"""The gallery: images that the base model and the trained model generate from the same prompts and noise, and a check for broken images."""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.sampling import Conditioning, image_from_pixels, sample_image
from sdxl_pipeline.runtime.specs import TrainingDataset, ValidationImage, ValidationPrompt
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.validation.image_file_names import distinct_stems, file_stem

TEXT_COLOUR, TITLE_COLOUR, BACKGROUND = "#222222", "#767676", "#ffffff"
SMALL_EDGE, LARGE_EDGE = 256, 384
TEXT_LINES = 2


@dataclass(frozen=True)
class Pair:
    """Two images of the same prompt and seed."""

    before: Image.Image
    after: Image.Image
    caption: str


def comparison_grid(pairs: Sequence[Pair], titles: tuple[str, str]) -> Image.Image:
    """Return all pairs on one white image, each with its caption; `titles` are the headings of the two image columns.

    Images are scaled to fit squares of 256 pixels if all of them are at most that large, else of 384. Raises ValueError without pairs.
    """
    if not pairs:
        raise ValueError("a comparison needs at least one pair of images")
    largest = max(max(image.size) for pair in pairs for image in (pair.before, pair.after))
    edge = SMALL_EDGE if largest <= SMALL_EDGE else LARGE_EDGE
    gap, font = edge // 32, _font(edge // 16)
    line = round(font.size * 1.3)
    columns = math.ceil(math.sqrt(len(pairs) / 2))
    pair_w, block_w = 2 * edge + gap, 2 * edge + 5 * gap
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [
        max(_scaled_size(image, edge)[1] for pair in row for image in (pair.before, pair.after))
        for row in rows
    ]
    text_h = TEXT_LINES * line + 4 * gap
    size = (columns * block_w, line + 3 * gap + sum(heights) + len(rows) * text_h)
    grid = Image.new("RGB", size, BACKGROUND)
    canvas = ImageDraw.Draw(grid)
    for column in range(columns):
        for title, left in zip(titles, (0, edge + gap), strict=True):
            canvas.text((column * block_w + 2 * gap + left, gap), title, TITLE_COLOUR, font)
    top = line + 2 * gap
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            left = column * block_w + 2 * gap
            grid.paste(_resized(pair.before, edge), (left, top))
            grid.paste(_resized(pair.after, edge), (left + edge + gap, top))
            bottom = top + max(_scaled_size(pair.before, edge)[1], _scaled_size(pair.after, edge)[1]) + gap
            for number, text in enumerate(_wrapped(pair.caption, font, pair_w)):
                canvas.text((left, bottom + number * line), text, TEXT_COLOUR, font)
        top += height + text_h
    return grid


def labelled_grid(
    columns: Sequence[str], rows: Sequence[str], images: Sequence[Sequence[Image.Image | None]]
) -> Image.Image:
    """Return all images on one white image, by rows, under the columns' titles and with each row's text above it; None leaves a gap.

    Images are scaled like in `comparison_grid`. Raises ValueError without images, or for rows of another length than `columns`.
    """
    present = [image for row in images for image in row if image is not None]
    if not present or len(rows) != len(images) or any(len(row) != len(columns) for row in images):
        raise ValueError("a grid needs an image, a text for each row, and rows as long as the titles")
    edge = SMALL_EDGE if max(max(image.size) for image in present) <= SMALL_EDGE else LARGE_EDGE
    gap, font = edge // 32, _font(edge // 16)
    line, width = round(font.size * 1.3), len(columns) * (edge + gap) - gap
    texts = [_wrapped(text, font, width) for text in rows]
    heights = [max((_scaled_size(image, edge)[1] for image in row if image), default=0) for row in images]
    row_heights = [height + len(text) * line + 4 * gap for height, text in zip(heights, texts, strict=True)]
    grid = Image.new("RGB", (width + 4 * gap, line + 3 * gap + sum(row_heights)), BACKGROUND)
    canvas = ImageDraw.Draw(grid)
    lefts = [2 * gap + number * (edge + gap) for number in range(len(columns))]
    for title, left in zip(columns, lefts, strict=True):
        canvas.text((left, gap), _wrapped(title, font, edge)[0] if title else "", TITLE_COLOUR, font)
    top = line + 3 * gap
    for row, text, row_height in zip(images, texts, row_heights, strict=True):
        for number, part in enumerate(text):
            canvas.text((2 * gap, top + number * line), part, TEXT_COLOUR, font)
        for image, left in zip(row, lefts, strict=True):
            if image is not None:
                grid.paste(_resized(image, edge), (left, top + len(text) * line + gap // 2))
        top += row_height
    return grid


def _scaled_size(image: Image.Image, edge: int) -> tuple[int, int]:
    scale = edge / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _resized(image: Image.Image, edge: int) -> Image.Image:
    shrinks = max(image.size) > edge
    return image.convert("RGB").resize(
        _scaled_size(image, edge), Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    )


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    text = text[: TEXT_LINES * width]  # more cannot fit, and a caption may be a megabyte long
    characters = max(8, int(width * len(text) / max(font.getlength(text), 1)) - 2)
    return textwrap.wrap(text, characters, max_lines=TEXT_LINES, placeholder=" …")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's built-in font only has Latin letters; matplotlib ships one with Greek, Cyrillic and symbols.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


MAX_CAPTION_PROMPTS = 4
"""Number of captions used as prompts when the project has no validation prompt."""

BLACK_LEVEL = 2 / 255
"""An image with no value above this is black."""

CONSTANT_DEVIATION = 1 / 255
"""An image is constant if the standard deviation of every channel is below this."""


@dataclass(frozen=True)
class GalleryPrompt:
    """One image to generate."""

    name: str
    """Stem of the image's file."""
    text: str
    height: int
    width: int
    seed: int
    conditioning: Conditioning


@dataclass(frozen=True)
class GalleryImage:
    """A generated image."""

    prompt: GalleryPrompt
    pixels: np.ndarray
    """As the pipeline returned them, (H, W, 3) float32; in [0, 1] unless the image is broken."""
    defect: str | None
    """The result of `find_defect`."""

    @property
    def image(self) -> Image.Image:
        """The image in 8 bits; NaN becomes black."""
        return image_from_pixels(self.pixels)

    def save(self, folder: Path) -> Path:
        """Write the image as a PNG named after its prompt, and return its path."""
        path = folder / f"{self.prompt.name}.png"
        with atomic_path(path) as temporary:
            self.image.save(temporary, format="PNG")
        return path


@dataclass(frozen=True, order=True)
class GalleryColumn:
    """The weights that generate one column of the gallery; step 0 is the base model."""

    step: int
    weights: Literal["trained", "ema"] = "trained"
    scale: float = 1.0

    @property
    def folder(self) -> str:
        """Name of the folder with the column's images."""
        if not self.step:
            return "base"
        ema = "-ema" if self.weights == "ema" else ""
        return f"step-{self.step:08d}{ema}" + (f"-scale-{self.scale:g}" if self.scale != 1 else "")

    @property
    def title(self) -> str:
        """Title of the column."""
        return (
            f"step {self.step}" + (f" × {self.scale:g}" if self.scale != 1 else "")
            if self.step
            else "base model"
        )


@dataclass(frozen=True)
class ColumnImage:
    """One written image of a column."""

    column: GalleryColumn
    image: ValidationImage
    defect: str | None
    """The result of `find_defect`."""


def plan_columns(
    steps: Sequence[int],
    selected: GalleryColumn,
    num_checkpoints: int,
    scales: Sequence[float],
) -> list[GalleryColumn]:
    """Return the gallery's columns: the base model, the selected checkpoint and `num_checkpoints` others, and it at other scales.

    The others are evenly spaced among `steps`, from the last backwards. Scales 0 and 1 are the base model and the checkpoint itself.
    """
    others = sorted(set(steps) - {selected.step})
    count = min(num_checkpoints, len(others))
    chosen = {others[len(others) - 1 - number * len(others) // count] for number in range(count)}
    checkpoints = [replace(selected, step=step) for step in sorted({*chosen, selected.step})]
    strengths = [replace(selected, scale=scale) for scale in sorted(set(scales) - {0.0, 1.0})]
    return [GalleryColumn(0), *checkpoints, *strengths]


def generate_columns(
    columns: Sequence[GalleryColumn],
    activate: Callable[[GalleryColumn], AbstractContextManager[object]],
    plan: Callable[[], Sequence[GalleryPrompt]],
    render: Callable[[GalleryPrompt], GalleryImage],
    folder: Path,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> list[ColumnImage]:
    """Write the images of every column to its own folder in `folder`, column by column, so that each model is loaded once.

    `activate` puts a column's weights into the pipeline; `plan` then returns the prompts, since trained text encoders encode them
    differently; `render` generates one. `on_image` gets the number of finished images and of all images.
    """
    written: list[ColumnImage] = []
    for number, column in enumerate(columns):
        with activate(column):
            prompts = plan()
            for done, prompt in enumerate(prompts, number * len(prompts)):
                on_image(done, len(columns) * len(prompts))
                generated = render(prompt)
                image = ValidationImage(
                    step=column.step,
                    name=prompt.name,
                    prompt=prompt.text,
                    path=str(generated.save(folder / column.folder)),
                    seed=prompt.seed,
                    scale=column.scale,
                )
                written.append(ColumnImage(column, image, generated.defect))
    on_image(len(written), len(written))
    return written


def read_image(path: str | Path) -> Image.Image:
    """Return the image of a file as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def plan_gallery(
    prompts: Sequence[ValidationPrompt],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[GalleryPrompt]:
    """Return every prompt at every validation size and seed. Raises UserError for a prompt that was not encoded.

    `zeros_for_empty_prompt` is the base model's `force_zeros_for_empty_prompt`: without a negative prompt the pipeline then uses zeros,
    otherwise the encoded empty prompt.
    """
    gallery = []
    for prompt in prompts:
        conditioning = reader.conditioning(prompt.prompt, prompt.negative_prompt, zeros_for_empty_prompt)
        gallery += _at_all_sizes_and_seeds(prompt.name, prompt.prompt, settings, conditioning)
    return _with_unique_names(gallery)


def plan_caption_gallery(
    samples: Sequence[Sample],
    datasets: Sequence[TrainingDataset],
    settings: TrainingSettings,
    reader: BatchReader,
    zeros_for_empty_prompt: bool,
) -> list[GalleryPrompt]:
    """Return prompts for a project without any: the first distinct captions of its images, without a negative prompt."""
    captions: dict[str, str] = {}
    for dataset in datasets:
        table = pd.read_parquet(dataset.text_embeds.entries_path, columns=["embed_key", "caption"])
        captions.update(zip(table["embed_key"], table["caption"], strict=True))
    distinct = {captions[sample.embed_keys[0]]: sample for sample in reversed(samples)}
    gallery = []
    for number, (caption, sample) in enumerate(sorted(distinct.items())[:MAX_CAPTION_PROMPTS]):
        embeds = reader.text_embeds([sample], [sample.embed_keys[0]])
        negative = () if zeros_for_empty_prompt else reader.prompt_embeds("")
        conditioning = Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds, *negative)
        gallery += _at_all_sizes_and_seeds(f"caption_{number}", caption, settings, conditioning)
    return _with_unique_names(gallery)


def generate(
    pipeline: StableDiffusionXLPipeline,
    prompt: GalleryPrompt,
    settings: TrainingSettings,
    on_step: Callable[[], None] | None = None,
) -> GalleryImage:
    """Generate one image with the validation settings and check it for defects."""
    pixels = sample_image(
        pipeline, prompt.conditioning, (prompt.height, prompt.width), prompt.seed, settings, on_step
    )
    return GalleryImage(prompt, pixels, find_defect(pixels))


def find_defect(pixels: np.ndarray) -> str | None:
    """Return what is wrong with pixels (H, W, 3) of values in [0, 1]: "not finite", "black" or "constant", with details; else None."""
    if not np.isfinite(pixels).all():
        return f"not finite: {(~np.isfinite(pixels)).mean():.0%} of its values are NaN or infinite"
    if pixels.max() <= BLACK_LEVEL:
        return "black"
    if pixels.std(axis=(0, 1)).max() < CONSTANT_DEVIATION:
        return "constant: one colour everywhere"
    return None


def _at_all_sizes_and_seeds(
    name: str, text: str, settings: TrainingSettings, conditioning: Conditioning
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
            text=text,
            height=height,
            width=width,
            seed=seed,
            conditioning=conditioning,
        )
        for height, width in sizes
        for seed in seeds
    ]


def _with_unique_names(gallery: Sequence[GalleryPrompt]) -> list[GalleryPrompt]:
    """Return the prompts renamed so that no image file overwrites another."""
    names = distinct_stems(prompt.name for prompt in gallery)
    return [replace(prompt, name=name) for prompt, name in zip(gallery, names, strict=True)]
