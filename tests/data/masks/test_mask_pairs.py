"""Tests of masks: geometry equal to that of the image's crop, weights, and pairing by path."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from sdxl_pipeline.data.buckets.crop_plan import Crop, plan_crops
from sdxl_pipeline.data.decoding.pixels import load_crop
from sdxl_pipeline.data.masks.mask_pairs import (
    NO_IMAGE,
    NO_MASK,
    OTHER_MASK,
    OTHER_SHAPE,
    SEVERAL_MASKS,
    mask_crop,
    mask_overlay,
    pair_masks,
    pairs_digest,
)
from tests.support.crops import ORIENTATION, full_crop, stored_with_orientation

WIDTH, HEIGHT = 600, 400
# left, top, right, bottom: off-centre, so that every rotation or flip moves it
SUBJECT_BOX = (330, 60, 480, 210)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def paint_mask(mode: str, background: object, subject: object, scale: float = 1.0) -> Image.Image:
    image = Image.new(mode, (round(WIDTH * scale), round(HEIGHT * scale)), background)
    box = [round(edge * scale) for edge in SUBJECT_BOX]
    ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=subject)
    return image


def green_shares(pixels: np.ndarray) -> np.ndarray:
    """Return the share of green, rather than blue, in each 8 x 8 patch."""
    share = pixels[..., 1].astype(float) / 255
    height, width = share.shape
    return share.reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mask_scale", [1.0, 0.5, 1.75])
def test_mask_crop_any_geometry_matches_image_crop(make_dataset, folder, orientation, mask_scale):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = folder / "image.png"
    path.write_bytes(
        png(stored_with_orientation(orientation, paint_mask("RGB", "#0000ff", "#00ff00")), exif=exif)
    )
    mask = png(paint_mask("L", 0, 255, mask_scale))
    dataset = make_dataset(
        crop=True, resolution=192, aspect_bucket_alignment=64, crops_per_image=4, random_flip=True
    )
    scan = pd.DataFrame(
        [{"path": "image.png", "key": "ab" * 32, "height": HEIGHT, "width": WIDTH, "status": "kept"}]
    )
    rows, _ = plan_crops(dataset, scan, seed=3, held_out=(), is_eval=False)
    assert rows["flipped"].sum() == 4
    assert rows["crop_left"].nunique() > 2
    checked = 0
    for row in rows.itertuples():
        weights = mask_crop(mask, row, "mask")
        assert weights.dtype == np.float32
        assert weights.shape == (row.bucket_h // 8, row.bucket_w // 8)
        expected = green_shares(load_crop(path, row))
        # only the edge of the subject is resampled differently
        assert np.abs(weights - expected).max() < 0.25
        assert np.abs(weights - expected).mean() < 0.01
        checked += int(0.05 < expected.mean() < 0.9)
    assert checked > 2


def test_mask_crop_white_is_one_and_black_is_zero():
    crop = Crop(192, 128, 200, 300, 3, 71, 400, 600, 400, 600, flipped=True)
    for size in ((600, 400), (301, 200), (1999, 1333)):
        assert (mask_crop(png(Image.new("L", size, 255)), crop, "mask") == 1.0).all()
        assert (mask_crop(png(Image.new("L", size, 0)), crop, "mask") == 0.0).all()


def test_mask_crop_black_next_to_white_is_zero():
    mask = Image.new("L", (512, 512), 0)
    mask.paste(255, (0, 0, 256, 512))
    weights = mask_crop(png(mask), full_crop(512, 512), "mask")
    assert (weights[:, :32] == 1.0).all()
    assert (weights[:, 32:] == 0.0).all()


def test_mask_crop_kinds_weight_grey_and_colour():
    grey = png(Image.new("L", (64, 64), 51))
    assert np.allclose(mask_crop(grey, full_crop(64, 64), "mask"), 0.2)
    assert (mask_crop(grey, full_crop(64, 64), "segmentation") == 1.0).all()
    blue = png(Image.new("RGB", (64, 64), "#000040"))
    assert (mask_crop(blue, full_crop(64, 64), "mask") == 0.0).all()
    assert (mask_crop(blue, full_crop(64, 64), "segmentation") == 1.0).all()
    black = png(Image.new("RGB", (64, 64)))
    assert (mask_crop(black, full_crop(64, 64), "segmentation") == 0.0).all()


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_mask_crop_transparent_pixels_are_zero(kind):
    cutout = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    cutout.paste((255, 255, 255, 255), (0, 0, 32, 64))
    weights = mask_crop(png(cutout), full_crop(64, 64), kind)
    assert (weights[:, :4] == 1.0).all()
    assert (weights[:, 4:] == 0.0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_mask_crop_pixel_types_give_equal_weights(mode):
    grey = paint_mask("L", 0, 255)
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    )
    expected = mask_crop(png(grey), full_crop(HEIGHT, WIDTH), "mask")
    assert np.array_equal(mask_crop(png(image), full_crop(HEIGHT, WIDTH), "mask"), expected)


def test_mask_overlay_ignored_region_is_tinted(folder):
    image, mask = folder / "image.png", folder / "mask.png"
    image.write_bytes(png(Image.new("RGB", (WIDTH, HEIGHT), "white")))
    mask.write_bytes(png(paint_mask("L", 0, 255)))
    overlay = mask_overlay(image, mask, "mask", longest_edge=300)
    assert overlay.getpixel((200, 60)) == (255, 255, 255)
    red, green, _ = overlay.getpixel((20, 20))
    assert green < red < 255


def scanned(*files: tuple[str, str, int, int], dropped: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return a scan of files given as (path, content, width, height)."""
    rows = [
        {
            "path": path,
            "key": hashlib.sha256(content.encode()).hexdigest(),
            "width": width,
            "height": height,
            "status": "kept",
            "reason": "",
        }
        for path, content, width, height in files
    ]
    rows += [
        {"path": path, "key": "", "width": 0, "height": 0, "status": "dropped", "reason": "empty file"}
        for path in dropped
    ]
    return pd.DataFrame(rows)


def reasons(frame: pd.DataFrame) -> dict[str, str]:
    return dict(zip(frame["path"], frame["reason"], strict=True))


def test_pair_masks_by_path_reports_unpaired_files():
    images = scanned(
        ("a.jpg", "a", 600, 400),
        ("sub/a.jpg", "sub a", 600, 400),
        ("b.jpg", "b", 601, 399),
        ("cafe\u0301.jpg", "c", 600, 400),
        ("d.jpg", "d", 600, 400),
        ("e.jpg", "e", 600, 400),
        ("f.webp", "f", 600, 400),
        ("A.jpg", "A", 600, 400),
        dropped=("gone.jpg",),
    )
    masks = scanned(
        ("a.png", "mask a", 600, 400),
        ("sub/a.png", "mask sub a", 600, 400),
        ("b.png", "mask b", 300, 200),
        ("caf\u00e9.png", "mask c", 600, 400),
        ("d.png", "mask d", 400, 600),
        ("f.png", "mask f", 600, 400),
        ("f.gif", "mask f", 600, 400),
        ("f.webp", "mask f, the exact one", 600, 400),
        ("gone.png", "mask gone", 600, 400),
        dropped=("broken.png",),
    )
    paired = pair_masks(images, masks)
    assert dict(zip(paired.pairs["path"], paired.pairs["mask_path"], strict=True)) == {
        "a.jpg": "a.png",
        "sub/a.jpg": "sub/a.png",
        "b.jpg": "b.png",
        "cafe\u0301.jpg": "caf\u00e9.png",
        "f.webp": "f.webp",
    }
    assert reasons(paired.unmasked) == {"d.jpg": OTHER_SHAPE, "e.jpg": NO_MASK, "A.jpg": NO_MASK}
    assert reasons(paired.rejected) == {"d.jpg": OTHER_SHAPE}
    assert reasons(paired.unused) == {
        "f.png": NO_IMAGE,
        "f.gif": NO_IMAGE,
        "gone.png": NO_IMAGE,
        "broken.png": "empty file",
    }


def test_pair_masks_several_candidates_are_rejected():
    paired = pair_masks(
        scanned(("a.jpg", "a", 60, 40)), scanned(("a.png", "m", 60, 40), ("a.gif", "n", 60, 40))
    )
    assert reasons(paired.rejected) == {"a.jpg": SEVERAL_MASKS}


def test_pair_masks_copies_with_different_masks_are_rejected():
    images = scanned(("a.jpg", "same", 60, 40), ("b.jpg", "same", 60, 40), ("c.jpg", "c", 60, 40))
    masks_of_copies = scanned(("a.png", "m", 60, 40), ("b.png", "m", 60, 40), ("c.png", "n", 60, 40))
    assert len(pair_masks(images, masks_of_copies).pairs) == 3
    for masks in (
        scanned(("a.png", "m", 60, 40), ("b.png", "other", 60, 40), ("c.png", "n", 60, 40)),
        scanned(("a.png", "m", 60, 40), ("c.png", "n", 60, 40)),
    ):
        paired = pair_masks(images, masks)
        assert paired.pairs["path"].tolist() == ["c.jpg"]
        assert OTHER_MASK in reasons(paired.rejected).values()


def test_pairs_digest_depends_on_content_only():
    images, masks = scanned(("a.jpg", "a", 60, 40)), scanned(("a.png", "m", 60, 40))
    before = pairs_digest(pair_masks(images, masks).pairs)
    renamed = pair_masks(scanned(("x/b.jpg", "a", 60, 40)), scanned(("x/b.png", "m", 60, 40)))
    assert pairs_digest(renamed.pairs) == before
    edited = pair_masks(images, scanned(("a.png", "edited", 60, 40)))
    assert pairs_digest(edited.pairs) != before


def test_pair_masks_empty_scans_give_empty_pairs():
    empty = scanned(("a.jpg", "a", 60, 40)).iloc[:0]
    assert len(pair_masks(empty, empty).pairs) == 0
    assert reasons(pair_masks(scanned(("a.jpg", "a", 60, 40)), empty).unmasked) == {"a.jpg": NO_MASK}


def test_mask_crop_path_equals_bytes(folder):
    path = Path(folder) / "mask.png"
    path.write_bytes(png(paint_mask("L", 0, 255)))
    crop = full_crop(HEIGHT, WIDTH)
    assert np.array_equal(mask_crop(path, crop, "mask"), mask_crop(path.read_bytes(), crop, "mask"))
