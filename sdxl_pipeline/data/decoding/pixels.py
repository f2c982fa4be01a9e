"""Pixels of crops for training: 8-bit sRGB, upright, opaque, resampled once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.colour import to_8_bit, to_srgb
from sdxl_pipeline.data.decoding.image_decoding import (
    UnreadableImage,
    decode,
    open_image,
    unexpected_as_unreadable,
    upright,
)


def load_crop(image: Path | bytes, crop: Crop) -> np.ndarray:
    """Return the planned crop of an image, given as file or content: uint8 sRGB of shape (bucket_h, bucket_w, 3).

    `crop` may be any object with Crop's attributes, such as a row of the plan from `itertuples`. The window is resampled once, with
    Lanczos, directly from the full-size image: the same pixels as resizing the full image and cropping, for less work. For a
    flipped crop the corresponding window of the original image is cropped and then mirrored.

    Raises UnreadableImage if the file cannot be read or decoded, or its size is not the planned one.
    """
    return load_crops(image, [crop])[0]


@unexpected_as_unreadable()
def load_crops(image: Path | bytes, crops: Sequence[Crop]) -> list[np.ndarray]:
    """Return `load_crop` for several crops of one image, which is decoded once."""
    with decode_file(image) as opened:
        icc_profile = opened.info.get("icc_profile")
        full_image = to_8_bit(upright(opened))
    return [_crop_pixels(full_image, crop, icc_profile) for crop in crops]


def _crop_pixels(image: Image.Image, crop: Crop, icc_profile: bytes | None) -> np.ndarray:
    if (image.height, image.width) != (crop.original_h, crop.original_w):
        raise UnreadableImage(
            f"changed since the scan: {image.width}x{image.height} pixels, "
            f"planned at {crop.original_w}x{crop.original_h}"
        )
    window = crop_window(crop, image.height, image.width)
    resized = image.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.LANCZOS, box=window)
    pixels = np.asarray(to_srgb(resized, icc_profile))
    return np.ascontiguousarray(pixels[:, ::-1]) if crop.flipped else pixels


def crop_window(crop: Crop, height: int, width: int) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a crop in the upright image, or in its mask, of `height` x `width` pixels.

    For a flipped crop the window is that in the original image, before mirroring.
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
    # a rounding error of the product may exceed the image, for which Pillow raises
    return (*window[:2], min(window[2], width), min(window[3], height))


@unexpected_as_unreadable()
def load_upright(path: Path, longest_edge: int | None = None) -> Image.Image:
    """Return the full upright image in mode RGB (sRGB), downscaled so that no edge exceeds `longest_edge`.

    Raises UnreadableImage.
    """
    with decode_file(path) as opened:
        icc_profile = opened.info.get("icc_profile")
        image = to_8_bit(upright(opened))
    if longest_edge is not None:
        image.thumbnail((longest_edge, longest_edge), Image.Resampling.LANCZOS)
    return to_srgb(image, icc_profile)


def decode_file(image: Path | bytes) -> Image.Image:
    """Return the decoded first frame of an image, given as file or content, not upright. Raise UnreadableImage if it has none."""
    with unexpected_as_unreadable():
        data = image if isinstance(image, bytes) else image.read_bytes()
    opened = open_image(data)
    decode(opened)
    return opened
