"""The validation grid of a run: one row per image name, one column per step."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.runtime.specs import ValidationImage

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
