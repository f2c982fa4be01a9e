"""The pixels a crop is trained on: 8-bit sRGB, upright, opaque, resampled once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.colour import to_eight_bits, to_srgb
from sdxl_pipeline.data.decoding.image_decoding import (
    UnreadableImage,
    decode,
    open_image,
    unexpected_as_unreadable,
    upright,
)


def load_crop(image: Path | bytes, crop: Crop) -> np.ndarray:
    """The planned crop of an image, given as its file or the file's content: uint8 sRGB of shape (bucket_h, bucket_w, 3).

    `crop` may be anything with Crop's attributes, such as a row of the plan from `itertuples`. The window is resampled once, by
    Lanczos, straight from the full-size image: the same pixels as resizing the whole and cutting the window, for less work. Of a
    mirrored image the window is cut where it lies in the image as it is, and then mirrored.

    Raises UnreadableImage when the file cannot be read or decoded, or is no longer of the size it was planned for.
    """
    return load_crops(image, [crop])[0]


@unexpected_as_unreadable()
def load_crops(image: Path | bytes, crops: Sequence[Crop]) -> list[np.ndarray]:
    """`load_crop` of several crops of one image, which is decoded once."""
    with decoded(image) as opened:
        icc_profile = opened.info.get("icc_profile")
        whole = to_eight_bits(upright(opened))
    return [_cut(whole, crop, icc_profile) for crop in crops]


def _cut(image: Image.Image, crop: Crop, icc_profile: bytes | None) -> np.ndarray:
    if (image.height, image.width) != (crop.original_h, crop.original_w):
        raise UnreadableImage(
            f"changed since the scan: {image.width}x{image.height} pixels, "
            f"planned at {crop.original_w}x{crop.original_h}"
        )
    window = crop_window(crop, image.height, image.width)
    cut = image.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.LANCZOS, box=window)
    pixels = np.asarray(to_srgb(cut, icc_profile))
    return np.ascontiguousarray(pixels[:, ::-1]) if crop.flipped else pixels


def crop_window(crop: Crop, height: int, width: int) -> tuple[float, float, float, float]:
    """Where a crop lies in the upright image, or in a mask of it, of `height` x `width` pixels: (left, top, right, bottom).

    Of a mirrored image it is the window in the image as it is, before the mirroring.
    """
    scale_h = height / crop.resized_h
    scale_w = width / crop.resized_w
    left = crop.resized_w - crop.bucket_w - crop.crop_left if crop.flipped else crop.crop_left
    window = (
        left * scale_w,
        crop.crop_top * scale_h,
        (left + crop.bucket_w) * scale_w,
        (crop.crop_top + crop.bucket_h) * scale_h,
    )
    # the product above may end a rounding error outside the image, which Pillow refuses
    return (*window[:2], min(window[2], width), min(window[3], height))


@unexpected_as_unreadable()
def load_upright(path: Path, longest_edge: int | None = None) -> Image.Image:
    """The whole image as it is meant to be seen, in mode RGB (sRGB), shrunk so that no edge exceeds `longest_edge`.

    Raises UnreadableImage.
    """
    with decoded(path) as opened:
        icc_profile = opened.info.get("icc_profile")
        image = to_eight_bits(upright(opened))
    if longest_edge is not None:
        image.thumbnail((longest_edge, longest_edge), Image.Resampling.LANCZOS)
    return to_srgb(image, icc_profile)


def decoded(image: Path | bytes) -> Image.Image:
    """The first frame of an image, given as its file or the file's content, as it is stored. Raises UnreadableImage."""
    with unexpected_as_unreadable():
        data = image if isinstance(image, bytes) else image.read_bytes()
    opened = open_image(data)
    decode(opened)
    return opened
