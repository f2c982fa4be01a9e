"""Contact sheets and plots of datasets for the UI, as Pillow images.

matplotlib is imported lazily and used only through its object interface, without windows or global state.
"""

import functools
import io
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.decoding.pixels import load_upright

_INK, _FAINT, _PAPER, _EMPTY = "#222222", "#767676", "#ffffff", "#e6e6e6"
_BLUE, _ORANGE, _GREY, _RED = "#3b6fb6", "#e08214", "#b5b5b5", "#c0392b"
_MAX_BARS = 24


def contact_sheet(
    images: Sequence[Image.Image | Path], captions: Sequence[str], columns: int | None = None, tile: int = 224
) -> Image.Image:
    """Return a grid of images, each fitted into a square of `tile` pixels above its caption (two lines at most).

    A path is read upright and in sRGB; one that cannot be read becomes an empty tile with the reason. Raises ValueError if there are no
    images, or if the numbers of images and captions differ.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    if columns is None:
        rows = max(1, round(math.sqrt(len(images) / 1.5)))
        columns = math.ceil(len(images) / rows)  # the last row about as full as the others
    gap = max(tile // 20, 6)
    font = _font(max(tile // 16, 11))
    line_height = round(font.size * 1.3)
    cell_h, cell_w = tile + gap // 2 + 2 * line_height + gap, tile + gap
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = gap + index % columns * cell_w, gap + index // columns * cell_h
        thumbnail = _tile(image, tile)
        sheet.paste(thumbnail, (left + (tile - thumbnail.width) // 2, top + (tile - thumbnail.height) // 2))
        for number, line in enumerate(_wrap(caption, font, tile, lines=2)):
            draw.text((left, top + tile + gap // 2 + number * line_height), line, fill=_INK, font=font)
    return sheet


def grouped_sheet(
    groups: Sequence[Sequence[tuple[Image.Image | Path, str]]], columns: int = 4, tile: int = 160
) -> Image.Image:
    """Return a sheet with a row for each group of captioned images, limited to the first `columns` of a group.

    Raises ValueError if there is no group.
    """
    blank = Image.new("RGB", (1, 1), _PAPER)
    cells: list[tuple[Image.Image | Path, str]] = []
    columns = min(columns, max((len(group) for group in groups), default=0))
    for group in groups:
        cells += [*group[:columns], *[(blank, "")] * (columns - len(group))]
    return contact_sheet([image for image, _ in cells], [caption for _, caption in cells], columns, tile)


def to_jpeg(image: Image.Image, max_bytes: int = 300_000) -> bytes:
    """Return the image as a JPEG of at most `max_bytes`, by reducing first the quality and then the size."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    while True:
        for quality in (92, 85, 75, 65, 55):
            data = _jpeg(image, quality)
            if len(data) <= max_bytes:
                return data
        if max(image.size) <= 16:
            raise ValueError(f"no JPEG fits into {max_bytes} bytes")
        image = image.resize(
            (max(image.width * 4 // 5, 1), max(image.height * 4 // 5, 1)), Image.Resampling.LANCZOS
        )


def bucket_histogram(rows: pd.DataFrame, short: Collection[tuple[int, int]] = ()) -> Image.Image:
    """Return a bar chart of the train and eval crops per bucket, from tallest to widest.

    `rows` is a crop plan. Beyond 24 buckets the least filled are summed in one bar. The bars of `short`, buckets (width, height) that do
    not fill a batch, are red; some of them are included even if there are many fuller ones.
    """
    from matplotlib.patches import Patch

    counts = rows.groupby(["bucket_w", "bucket_h", "split"]).size().unstack("split", fill_value=0)
    counts = counts.reindex(columns=["train", "eval"], fill_value=0)
    totals = counts.sum(axis=1)
    buckets_by_count = totals.sort_values(ascending=False, kind="stable").index.tolist()
    short_buckets = [size for size in reversed(buckets_by_count[_MAX_BARS:]) if size in short][
        : _MAX_BARS // 4
    ]
    selected = counts.loc[buckets_by_count[: _MAX_BARS - len(short_buckets)] + short_buckets]
    selected = selected.loc[
        sorted(selected.index, key=lambda size: (size[0] / size[1], size[0]), reverse=True)
    ]
    labels = [f"{width}x{height}" for width, height in selected.index]
    train, evaluation = selected["train"].tolist(), selected["eval"].tolist()
    if len(counts) > len(selected):
        others = counts.sum() - selected.sum()
        labels.insert(0, f"{len(counts) - len(selected)} others")
        train.insert(0, int(others["train"]))
        evaluation.insert(0, int(others["eval"]))
    figure, axes = _axes(height=1.5 + 0.3 * max(len(labels), 3))
    largest = max([a + b for a, b in zip(train, evaluation, strict=True)], default=1)
    names = {f"{width}x{height}" for width, height in short}
    red = [label in names for label in labels]
    axes.barh(labels, train, color=[_RED if bad else _BLUE for bad in red], height=0.72)
    axes.barh(labels, evaluation, left=train, color=_ORANGE, height=0.72)
    for position, total in enumerate(a + b for a, b in zip(train, evaluation, strict=True)):
        axes.text(total + largest * 0.01, position, f"{total:,}", va="center", color=_INK, fontsize=9)
    axes.set_xlim(0, largest * 1.1)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set_xlabel("crops")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{len(rows):,} crops in {len(counts)} buckets (width x height)", loc="left", fontsize=11)
    legend = {"train": _BLUE} | ({"too few for a batch": _RED} if any(red) else {})
    legend |= {"eval": _ORANGE} if any(evaluation) else {}
    if len(legend) > 1:
        handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False)
    return _rasterize(figure)


def resolution_scatter(scanned: pd.DataFrame) -> Image.Image:
    """Return a scatter plot of width and height of every kept and dropped image of a scan, on equal logarithmic axes."""
    images = scanned[scanned["width"] > 0]
    figure, axes = _axes(height=5.2, width=6.0)
    for status, colour in (("dropped", _GREY), ("kept", _BLUE)):
        images_of_status = images[images["status"] == status]
        if len(images_of_status):
            axes.scatter(
                images_of_status["width"],
                images_of_status["height"],
                s=26,
                color=colour,
                alpha=0.65,
                linewidths=0,
                label=f"{status} ({len(images_of_status):,})",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    edges = [*images["width"], *images["height"]] or [1]
    low, high = 2 ** (math.log2(min(edges)) - 0.3), 2 ** (math.log2(max(edges)) + 0.3)
    ticks = [edge for edge in _round_edges(low, high) if low <= edge <= high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[f"{edge:,}" for edge in ticks])
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.axline((low, low), (high, high), color=_FAINT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    axes.set_xlabel("width in pixels")
    axes.set_ylabel("height in pixels")
    axes.set_title(f"Sizes of {len(images):,} images", loc="left", fontsize=11)
    if len(images):
        axes.legend(loc="upper left", frameon=False)
    return _rasterize(figure)


def caption_length_histogram(scanned: pd.DataFrame) -> Image.Image:
    """Return a histogram of the caption lengths of the kept images in words, with the median."""
    captions = [text for texts in scanned.loc[scanned["status"] == "kept", "captions"] for text in texts]
    lengths = pd.Series([len(text.split()) for text in captions], dtype="int64")
    figure, axes = _axes(height=3.4)
    if len(lengths):
        longest = int(lengths.max())
        width = max(1, math.ceil((longest + 1) / 40))
        # bins centred on integers, so that a bar is above its number
        axes.hist(
            lengths,
            bins=[edge - 0.5 for edge in range(0, longest + 1 + width, width)],
            color=_BLUE,
            rwidth=0.9,
        )
        median = float(lengths.median())
        axes.axvline(median, color=_ORANGE, linewidth=1.6, label=f"median {median:g}")
        axes.legend(frameon=False)
    axes.set_xlabel("words in the caption")
    axes.set_ylabel("captions")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_title(f"Length of {len(lengths):,} captions", loc="left", fontsize=11)
    return _rasterize(figure)


def _tile(image: Image.Image | Path, tile: int) -> Image.Image:
    if isinstance(image, Path):
        try:
            image = load_upright(image, longest_edge=tile)
        except UnreadableImage as error:
            return _empty_tile(error.reason, tile)
    scale = tile / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    # nearest neighbour preserves the pixels of a tiny image
    resampling = (
        Image.Resampling.LANCZOS
        if scale < 1
        else Image.Resampling.NEAREST
        if scale > 4
        else Image.Resampling.BICUBIC
    )
    return image.convert("RGB").resize(size, resampling)


def _empty_tile(reason: str, tile: int) -> Image.Image:
    image = Image.new("RGB", (tile, tile), _EMPTY)
    font = _font(max(tile // 16, 11))
    lines = "\n".join(_wrap(reason, font, tile - 16, lines=4))
    ImageDraw.Draw(image).multiline_text(
        (tile / 2, tile / 2), lines, _FAINT, font, anchor="mm", align="center"
    )
    return image


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Return `text` wrapped into at most `lines` lines of `width` pixels; an ellipsis marks truncated text.

    The cost is bounded: at most as many characters are measured as would fit if each were a pixel wide.
    """
    max_width = lines * width
    words = deque(" ".join(text[: 8 * max_width].split())[: max_width + 1].split(" "))
    wrapped: list[str] = []
    while words and words[0] and len(wrapped) < lines:
        line = words.popleft()
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.popleft()
        wrapped.append(line)
    if words and wrapped:
        wrapped[-1] += " …"
    return [_shorten(line, font, width) for line in wrapped]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    fitting_length = bisect_left(
        range(1, len(line) + 1), True, key=lambda count: font.getlength(line[:count] + "…") > width
    )
    return line[:fitting_length] + "…"


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own font has only Latin letters; that of matplotlib has Greek, Cyrillic and symbols
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
    return buffer.getvalue()


def _round_edges(low: float, high: float) -> list[int]:
    """Return the powers of two around `low` to `high`, with intermediate steps if there are few."""
    powers = [2**exponent for exponent in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    if len(powers) > 4:
        return powers
    return sorted({*powers, *(power * 3 // 2 for power in powers if power > 1)})


def _axes(height: float, width: float = 7.2) -> tuple[Any, Any]:
    """Return a figure of `height` x `width` inches with one pair of styled axes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout, facecolor=_PAPER)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
    axes.grid(color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _rasterize(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
