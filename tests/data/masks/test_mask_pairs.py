"""Holds: a mask lies where its image's content lies after any geometry, and pairs are made by path, with all others named."""

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
    overlaid,
    pair_masks,
)
from tests.data.decoding.test_pixels import ORIENTATION, turned_for, whole

WIDTH, HEIGHT = 600, 400
EVAL_MODEL = (
    330,
    60,
    480,
    210,
)  # left, top, right, bottom: away from the middle, so that no turn or flip leaves it in place


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def painted(mode: str, background: object, subject: object, scale: float = 1.0) -> Image.Image:
    image = Image.new(mode, (round(WIDTH * scale), round(HEIGHT * scale)), background)
    box = [round(edge * scale) for edge in EVAL_MODEL]
    ImageDraw.Draw(image).rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=subject)
    return image


def green_places(pixels: np.ndarray) -> np.ndarray:
    """The share of each 8 x 8 place that is green rather than blue."""
    share = pixels[..., 1].astype(float) / 255
    height, width = share.shape
    return share.reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mask_scale", [1.0, 0.5, 1.75])
def test_a_mask_lies_where_its_images_content_lies(make_dataset, folder, orientation, mask_scale):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = folder / "image.png"
    path.write_bytes(png(turned_for(orientation, painted("RGB", "#0000ff", "#00ff00")), exif=exif))
    mask = png(painted("L", 0, 255, mask_scale))
    dataset = make_dataset(
        crop=True, resolution=192, aspect_bucket_alignment=64, crops_per_image=4, random_flip=True
    )
    scan = pd.DataFrame(
        [{"path": "image.png", "key": "ab" * 32, "height": HEIGHT, "width": WIDTH, "status": "kept"}]
    )
    rows, _ = plan_crops(dataset, scan, seed=3, held_out=(), is_eval=False)
    assert rows["flipped"].sum() == 4
    assert rows["crop_left"].nunique() > 2
    seen = 0
    for row in rows.itertuples():
        weights = mask_crop(mask, row, "mask")
        assert weights.dtype == np.float32
        assert weights.shape == (row.bucket_h // 8, row.bucket_w // 8)
        expected = green_places(load_crop(path, row))
        # only what lies on the subject's edge is resampled differently
        assert np.abs(weights - expected).max() < 0.25
        assert np.abs(weights - expected).mean() < 0.01
        seen += int(0.05 < expected.mean() < 0.9)
    assert seen > 2


def test_all_white_is_one_and_all_black_is_zero_to_the_bit():
    crop = Crop(192, 128, 200, 300, 3, 71, 400, 600, 400, 600, flipped=True)
    for size in ((600, 400), (301, 200), (1999, 1333)):
        assert (mask_crop(png(Image.new("L", size, 255)), crop, "mask") == 1.0).all()
        assert (mask_crop(png(Image.new("L", size, 0)), crop, "mask") == 0.0).all()


def test_no_light_falls_on_a_black_place_beside_a_white_one():
    mask = Image.new("L", (512, 512), 0)
    mask.paste(255, (0, 0, 256, 512))
    weights = mask_crop(png(mask), whole(512, 512), "mask")
    assert (weights[:, :32] == 1.0).all()
    assert (weights[:, 32:] == 0.0).all()


def test_a_mask_weighs_by_its_grey_and_a_segmentation_by_any_light():
    grey = png(Image.new("L", (64, 64), 51))
    assert np.allclose(mask_crop(grey, whole(64, 64), "mask"), 0.2)
    assert (mask_crop(grey, whole(64, 64), "segmentation") == 1.0).all()
    blue = png(Image.new("RGB", (64, 64), "#000040"))
    assert (mask_crop(blue, whole(64, 64), "mask") == 0.0).all()
    assert (mask_crop(blue, whole(64, 64), "segmentation") == 1.0).all()
    black = png(Image.new("RGB", (64, 64)))
    assert (mask_crop(black, whole(64, 64), "segmentation") == 0.0).all()


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_what_is_transparent_is_ignored(kind):
    cutout = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    cutout.paste((255, 255, 255, 255), (0, 0, 32, 64))
    weights = mask_crop(png(cutout), whole(64, 64), kind)
    assert (weights[:, :4] == 1.0).all()
    assert (weights[:, 4:] == 0.0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_pixel_type_gives_the_same_mask(mode):
    grey = painted("L", 0, 255)
    image = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    )
    expected = mask_crop(png(grey), whole(HEIGHT, WIDTH), "mask")
    assert np.array_equal(mask_crop(png(image), whole(HEIGHT, WIDTH), "mask"), expected)


def test_the_overlay_darkens_what_is_ignored(folder):
    image, mask = folder / "image.png", folder / "mask.png"
    image.write_bytes(png(Image.new("RGB", (WIDTH, HEIGHT), "white")))
    mask.write_bytes(png(painted("L", 0, 255)))
    shown = overlaid(image, mask, "mask", longest_edge=300)
    assert shown.getpixel((200, 60)) == (255, 255, 255)
    red, green, _ = shown.getpixel((20, 20))
    assert green < red < 255


def scanned(*files: tuple[str, str, int, int], dropped: tuple[str, ...] = ()) -> pd.DataFrame:
    """Files as a scan gives them: path, content, width and height of each."""
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


def test_pairs_are_made_by_path_and_all_others_are_named():
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
    assert reasons(paired.without) == {"d.jpg": OTHER_SHAPE, "e.jpg": NO_MASK, "A.jpg": NO_MASK}
    assert reasons(paired.refused) == {"d.jpg": OTHER_SHAPE}
    assert reasons(paired.unused) == {
        "f.png": NO_IMAGE,
        "f.gif": NO_IMAGE,
        "gone.png": NO_IMAGE,
        "broken.png": "empty file",
    }


def test_a_mask_that_could_be_one_of_several_is_none():
    paired = pair_masks(
        scanned(("a.jpg", "a", 60, 40)), scanned(("a.png", "m", 60, 40), ("a.gif", "n", 60, 40))
    )
    assert reasons(paired.refused) == {"a.jpg": SEVERAL_MASKS}


def test_copies_of_an_image_must_have_one_mask():
    images = scanned(("a.jpg", "same", 60, 40), ("b.jpg", "same", 60, 40), ("c.jpg", "c", 60, 40))
    one = scanned(("a.png", "m", 60, 40), ("b.png", "m", 60, 40), ("c.png", "n", 60, 40))
    assert len(pair_masks(images, one).pairs) == 3
    for masks in (
        scanned(("a.png", "m", 60, 40), ("b.png", "other", 60, 40), ("c.png", "n", 60, 40)),
        scanned(("a.png", "m", 60, 40), ("c.png", "n", 60, 40)),
    ):
        paired = pair_masks(images, masks)
        assert paired.pairs["path"].tolist() == ["c.jpg"]
        assert OTHER_MASK in reasons(paired.refused).values()


def test_the_digest_is_of_contents_and_not_of_names():
    images, masks = scanned(("a.jpg", "a", 60, 40)), scanned(("a.png", "m", 60, 40))
    before = pair_masks(images, masks).digest()
    renamed = pair_masks(scanned(("x/b.jpg", "a", 60, 40)), scanned(("x/b.png", "m", 60, 40)))
    assert renamed.digest() == before
    assert pair_masks(images, scanned(("a.png", "edited", 60, 40))).digest() != before


def test_nothing_pairs_with_nothing():
    empty = scanned(("a.jpg", "a", 60, 40)).iloc[:0]
    assert len(pair_masks(empty, empty).pairs) == 0
    assert reasons(pair_masks(scanned(("a.jpg", "a", 60, 40)), empty).without) == {"a.jpg": NO_MASK}


def test_a_file_is_read_as_its_bytes_are(folder):
    path = Path(folder) / "mask.png"
    path.write_bytes(png(painted("L", 0, 255)))
    crop = whole(HEIGHT, WIDTH)
    assert np.array_equal(mask_crop(path, crop, "mask"), mask_crop(path.read_bytes(), crop, "mask"))
