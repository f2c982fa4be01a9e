"""The before-and-after sheet: for each prompt the base model's image beside the LoRA's."""

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER = "#222222", "#767676", "#ffffff"
SMALL_EDGE, LARGE_EDGE = 256, 384
TEXT_LINES = 2


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt and seed."""

    before: Image.Image
    after: Image.Image
    caption: str


def comparison_sheet(pairs: Sequence[Pair], titles: tuple[str, str]) -> Image.Image:
    """All pairs on one white sheet, each with its caption; `titles` stand above the two columns of images.

    Images are fitted into squares: of 256 pixels when all are small, else of 384. Raises ValueError without pairs.
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
    heights = [max(_fitted(p, edge)[1] for pair in row for p in (pair.before, pair.after)) for row in rows]
    text_h = TEXT_LINES * line + 4 * gap
    size = (columns * block_w, line + 3 * gap + sum(heights) + len(rows) * text_h)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        for title, left in zip(titles, (0, edge + gap), strict=True):
            draw.text((column * block_w + 2 * gap + left, gap), title, FAINT, font)
    top = line + 2 * gap
    for row, height in zip(rows, heights, strict=True):
        for column, pair in enumerate(row):
            left = column * block_w + 2 * gap
            sheet.paste(_resized(pair.before, edge), (left, top))
            sheet.paste(_resized(pair.after, edge), (left + edge + gap, top))
            below = top + max(_fitted(pair.before, edge)[1], _fitted(pair.after, edge)[1]) + gap
            for number, text in enumerate(_lines(pair.caption, font, pair_w)):
                draw.text((left, below + number * line), text, INK, font)
        top += height + text_h
    return sheet


def _fitted(image: Image.Image, edge: int) -> tuple[int, int]:
    scale = edge / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _resized(image: Image.Image, edge: int) -> Image.Image:
    smaller = max(image.size) > edge
    return image.convert("RGB").resize(
        _fitted(image, edge), Image.Resampling.LANCZOS if smaller else Image.Resampling.BICUBIC
    )


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    text = text[: TEXT_LINES * width]  # no more fits, and a caption may be a megabyte
    characters = max(8, int(width * len(text) / max(font.getlength(text), 1)) - 2)
    return textwrap.wrap(text, characters, max_lines=TEXT_LINES, placeholder=" …")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has Latin letters only; matplotlib brings one with Greek, Cyrillic and symbols.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
