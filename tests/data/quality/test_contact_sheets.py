"""Tests of contact sheets and plots for the UI: complete content within the size limit."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sdxl_pipeline.data.quality.contact_sheets import (
    _wrap,
    bucket_histogram,
    caption_length_histogram,
    contact_sheet,
    grouped_sheet,
    resolution_scatter,
    to_jpeg,
)
from tests.support.photographs import PHOTOGRAPHS, encoded, values


def colour_share(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 12) -> float:
    return float((np.abs(values(image) - np.array(colour)).max(axis=2) <= tolerance).mean())


BLUE, ORANGE, RED = (0x3B, 0x6F, 0xB6), (0xE0, 0x82, 0x14), (0xC0, 0x39, 0x2B)


def test_contact_sheet_has_every_image_and_caption(folder, photograph):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)]
    images = [
        Image.new("RGB", size, colour)
        for size, colour in zip([(64, 64), (128, 32), (16, 64), (64, 64)], colours, strict=True)
    ]
    sheet = contact_sheet(images, ["one", "two", "three", ""], columns=2, tile=100)
    areas = [colour_share(sheet, colour) * sheet.width * sheet.height for colour in colours]
    # a square fills its tile, a 4:1 image a quarter of it
    assert areas == pytest.approx([10_000, 2_500, 2_500, 10_000], rel=0.05)
    sheet_without_captions = contact_sheet(images, ["", "", "", ""], columns=2, tile=100)
    assert sheet_without_captions.size == sheet.size
    ink = np.argwhere(np.abs(values(sheet) - values(sheet_without_captions)).max(axis=2) > 60)
    assert len(ink) > 50
    assert ink[:, 0].min() > 100  # text is below the images


def test_contact_sheet_long_captions_are_truncated(photograph):
    words, letters = "a very long caption indeed " * 20, "x" * 500
    sheet = contact_sheet([photograph, photograph], [words, letters], columns=2, tile=120)
    below = values(sheet)[130:]
    gap_columns = below[:, 126:132]  # between the two captions, and to the right of the second
    assert gap_columns.min() == 255
    assert below[:, -5:].min() == 255
    assert below.min() < 100


class MeasuredFont:
    """Font that counts measured characters, and fails if their number grows with the text."""

    def __init__(self) -> None:
        self.measured = 0

    def getlength(self, text: str) -> float:
        self.measured += len(text)
        assert self.measured < 50_000
        return 7.0 * len(text)


@pytest.mark.parametrize("text", ["word " * 3_000, "word " * 180_000, "x" * 900_000, " \n" * 450_000])
def test_wrap_long_text_has_bounded_cost(text):
    lines = _wrap(text, MeasuredFont(), 224, lines=2)
    assert len(lines) == (2 if "w" in text else bool(text.strip()))
    assert all(7 * len(line) <= 224 for line in lines)
    assert not lines or lines[-1].endswith("…")


def test_wrap_breaks_between_words():
    assert _wrap("one two three", MeasuredFont(), 56, lines=3) == ["one two", "three"]
    assert _wrap("one two three four", MeasuredFont(), 63, lines=2) == ["one two", "three …"]
    assert _wrap("unbreakable", MeasuredFont(), 42, lines=2) == ["unbre…"]
    assert _wrap("", MeasuredFont(), 42, lines=2) == []


def test_contact_sheet_files_are_upright_or_empty_tiles(folder, photograph):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encoded(photograph, "JPEG", exif=exif, quality=95))
    upright = contact_sheet([folder / "turned.jpg"], [""], tile=200)
    expected = contact_sheet([photograph.rotate(-90, expand=True)], [""], tile=200)
    assert np.abs(values(upright) - values(expected)).mean() < 3
    (folder / "bad.jpg").write_bytes(b"")
    broken = contact_sheet([folder / "bad.jpg"], [""], tile=200)
    assert colour_share(broken, (0xE6, 0xE6, 0xE6), 0) > 0.5


def test_contact_sheet_invalid_arguments_raise(photograph):
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        contact_sheet([photograph, photograph], ["one"])


def test_to_jpeg_reduces_quality_before_size():
    with Image.open(PHOTOGRAPHS / "hubble_deep_field.jpg") as image:  # 1000x872 of stars: hard to compress
        image = image.convert("RGB")
    previous = len(to_jpeg(image, max_bytes=10_000_000))
    for limit in (200_000, 150_000, 40_000):
        data = to_jpeg(image, max_bytes=limit)
        assert len(data) <= limit
        assert len(data) < previous
        previous = len(data)
    with Image.open(io.BytesIO(to_jpeg(image, max_bytes=200_000))) as full_size:
        assert full_size.size == image.size
    with Image.open(io.BytesIO(to_jpeg(image, max_bytes=40_000))) as small:
        assert small.width < 1000
        assert small.width / small.height == pytest.approx(1000 / 872, rel=0.02)
    assert len(to_jpeg(image.convert("RGBA"))) <= 300_000
    with pytest.raises(ValueError, match="no JPEG fits"):
        to_jpeg(image, max_bytes=100)


def plan(counts: dict[tuple[int, int], tuple[int, int]]) -> pd.DataFrame:
    rows = [
        {"bucket_w": width, "bucket_h": height, "split": split}
        for (width, height), numbers in counts.items()
        for split, number in zip(("train", "eval"), numbers, strict=True)
        for _ in range(number)
    ]
    return pd.DataFrame(rows, columns=["bucket_w", "bucket_h", "split"])


def test_bucket_histogram_bars_are_proportional_to_counts():
    image = bucket_histogram(plan({(1024, 1024): (30, 10), (1280, 832): (30, 10), (832, 1280): (30, 10)}))
    assert colour_share(image, BLUE) / colour_share(image, ORANGE) == pytest.approx(3, rel=0.15)
    assert colour_share(bucket_histogram(plan({(1024, 1024): (30, 0)})), ORANGE) == 0


def test_bucket_histogram_many_buckets_limits_height():
    image = bucket_histogram(plan({(64 * number, 1024): (number, 0) for number in range(1, 61)}))
    assert image.height < 1200
    assert colour_share(image, BLUE) > 0.05


def test_bucket_histogram_short_buckets_are_red():
    counts = {(1024, 1024): (30, 0), (832, 1280): (20, 0)}
    assert colour_share(bucket_histogram(plan(counts)), RED) == 0
    marked = bucket_histogram(plan(counts), {(832, 1280)})
    assert colour_share(marked, BLUE) / colour_share(marked, RED) == pytest.approx(1.5, rel=0.2)
    # included even if two dozen others are fuller
    counts |= {(64 * number, 768): (40, 0) for number in range(1, 41)}
    assert (
        colour_share(bucket_histogram(plan(counts), {(832, 1280)}), RED) > 0.0006
    )  # more than in the legend


def test_grouped_sheet_has_one_row_per_group(photograph):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]
    red, green, blue, pink, cyan = [(Image.new("RGB", (8, 8), colour), "") for colour in colours]
    sheet = grouped_sheet([[red, green], [blue, pink, cyan, red, red, red]], columns=3, tile=100)
    positions = []
    for colour in colours:
        ys, xs = np.nonzero((values(sheet) == colour).all(axis=2))
        positions.append(
            (round(ys.mean() / (sheet.height / 2) - 0.5), round(xs.mean() / (sheet.width / 3) - 0.5))
        )
        assert len(ys) == 10_000
    assert positions == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="at least one"):
        grouped_sheet([])


def test_plots_without_data_are_rendered():
    scanned = pd.DataFrame({"width": [0], "height": [0], "status": ["dropped"], "captions": [[]]})
    for image in (bucket_histogram(plan({})), resolution_scatter(scanned), caption_length_histogram(scanned)):
        assert image.mode == "RGB"
        assert image.width > 300


def test_plots_have_images_and_captions():
    scanned = pd.DataFrame(
        {
            "width": [640, 1920, 4000, 300],
            "height": [480, 1080, 6000, 300],
            "status": ["kept", "kept", "kept", "dropped"],
            "captions": [["a fox"], ["a fox", "a red fox in the snow"], ["one two three"], []],
        }
    )
    subset = scanned[:1]
    assert colour_share(resolution_scatter(scanned), BLUE, 75) > 2 * colour_share(
        resolution_scatter(subset), BLUE, 60
    )
    assert colour_share(caption_length_histogram(scanned), BLUE) > 0.01
    for image in (resolution_scatter(scanned), caption_length_histogram(scanned)):
        assert len(to_jpeg(image)) < 300_000
