"""The comparison grid: for each prompt the base model's image beside the trained model's."""

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
