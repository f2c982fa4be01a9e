"""Decoded pixels as 8-bit sRGB: colour profiles, transparency, bit depth.

The image is resized between the two steps: `to_8_bit` returns opaque 8-bit pixels in the image's own colour space, which can be
resampled; `to_srgb` then converts only the crop.
"""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import (
    SAMPLE_BITS,
    UnreadableImage,
    decode,
    open_image,
    unexpected_as_unreadable,
    upright,
)

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
_VALUES_PER_CHUNK = 1 << 22
_UNIT, _EIGHT_BITS, _SIXTEEN_BITS, _THIRTY_TWO_BITS = 1.0, 255.0, 65535.0, 4294967295.0


def to_8_bit(image: Image.Image) -> Image.Image:
    """Return the image in mode L, RGB, CMYK or LAB: transparency over white, palettes applied, deep pixels scaled down.

    16-bit integers are scaled by the full range of their samples (12 bits in some TIFFs). Wider integers and floats do not state their
    range: it is taken as the smallest of 16 and 32 bits, or of [0, 1], 8 and 16 bits for floats, that contains all values.
    """
    flat, alpha = split_alpha(image)
    if alpha is None:
        return flat
    layer = Image.merge("RGBA", (*flat.convert("RGB").split(), alpha))
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return (
        over_white.convert("L") if flat.mode == "L" else over_white
    )  # the mode that a grey ICC profile expects


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the image in 8 bits as `to_8_bit` does, without its transparency, and its alpha in mode L; None if it is opaque."""
    if not image.has_transparency_data:
        return _to_8_bit_mode(image), None
    if image.mode.startswith("I"):
        key = image.info["transparency"]
        opaque = (np.asarray(image) != key).astype(np.uint8) * 255
        return _to_8_bit_mode(image), Image.fromarray(opaque)
    if image.mode == "La":  # premultiplied; Pillow converts it only to LA
        image = image.convert("LA")
    grey = image.getbands()[0] == "L"
    *bands, alpha = image.convert("RGBA").split()
    return (bands[0] if grey else Image.merge("RGB", bands)), alpha


def _to_8_bit_mode(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _scaled(np.asarray(image), float((1 << image.info.get(SAMPLE_BITS, 16)) - 1))
    if image.mode == "I":
        values = np.asarray(image).view(np.uint32)
        return _scaled(values, _SIXTEEN_BITS if values.max() <= _SIXTEEN_BITS else _THIRTY_TWO_BITS)
    if image.mode == "F":
        values = np.asarray(image)
        largest = values.max()
        return _scaled(values, next(r for r in (_UNIT, _EIGHT_BITS, _SIXTEEN_BITS, largest) if largest <= r))
    if image.mode == "LAB" or image.mode in _PROFILE_SPACES:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")  # P, YCbCr, HSV


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Return an 8-bit image as sRGB, mode RGB, through its embedded ICC profile (relative colorimetric, as in browsers).

    Without a profile, or with one that is invalid or describes another colour space than that of the pixels, RGB and grey are treated
    as sRGB, and CMYK is converted as inverse RGB. A profile that describes sRGB itself, as in most photographs, is not applied: that
    would take half as long as decoding the image, and change one colour in seven hundred by one level.
    """
    if image.mode == "RGB" and icc_profile and _describes_srgb(icc_profile):
        return image
    profile = _LAB if image.mode == "LAB" else _usable_profile(image.mode, icc_profile)
    if profile is not None:
        converted = _converted(image, profile)
        if converted is not None:
            return converted
    return image.convert("RGB")


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image | None:
    try:
        return ImageCms.profileToProfile(
            image, profile, _SRGB, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except ImageCms.PyCMSError:  # the profile has no tables for this direction
        return None


@lru_cache(maxsize=32)
def _describes_srgb(icc_profile: bytes) -> bool:
    """Return whether a profile changes none of 4,913 evenly spaced colours by more than one level."""
    profile = _usable_profile("RGB", icc_profile)
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3)
    converted = None if profile is None else _converted(Image.fromarray(colours), profile)
    return converted is not None and bool(np.abs(np.asarray(converted).astype(int) - colours).max() <= 1)


def _usable_profile(mode: str, icc_profile: bytes | None) -> ImageCms.ImageCmsProfile | None:
    if not icc_profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        colour_space = profile.profile.xcolor_space
    except (OSError, ValueError):  # not a profile, or a header with invalid characters
        return None
    return profile if colour_space == _PROFILE_SPACES[mode] else None


def _scaled(values: np.ndarray, full_range: float) -> Image.Image:
    eight_bits = np.empty(values.shape, np.uint8)
    rows = max(1, _VALUES_PER_CHUNK // max(values.shape[1], 1))
    for start in range(0, len(values), rows):  # bounds the memory of float64 for large images
        scaled = values[start : start + rows].astype(np.float64) * (255.0 / full_range)
        eight_bits[start : start + rows] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return Image.fromarray(eight_bits)


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
