"""Any of Pillow's pixel types to 8 bits, and any colour space to sRGB: the conversions that are made on purpose.

They come in two steps because the image is resized in between: `to_eight_bits` leaves opaque 8-bit pixels in the image's own
colour space, which can be resampled; `to_srgb` then has only the crop to convert.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from sdxl_pipeline.data.decoding.image_decoding import SAMPLE_BITS

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
_VALUES_AT_ONCE = 1 << 22
_UNIT, _EIGHT_BITS, _SIXTEEN_BITS, _THIRTY_TWO_BITS = 1.0, 255.0, 65535.0, 4294967295.0


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return the same image in mode L, RGB, CMYK or LAB: transparency over white, palettes looked up, deep pixels scaled down.

    Integers in 16 bits are scaled by the full range of their samples, of 12 bits in some TIFFs. Wider ones and floats do not state
    theirs, so it is taken to be the smallest of 16 and 32 bits, or of [0, 1], 8 and 16 bits for floats, that holds all values.
    """
    flat, alpha = split_alpha(image)
    if alpha is None:
        return flat
    layer = Image.merge("RGBA", (*flat.convert("RGB").split(), alpha))
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return over_white.convert("L") if flat.mode == "L" else over_white  # as a grey ICC profile expects


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the image in 8 bits as `to_eight_bits` does, without its transparency, and its opacity in mode L; None when it is opaque."""
    if not image.has_transparency_data:
        return _opaque(image), None
    if image.mode.startswith("I"):
        key = image.info["transparency"]
        opaque = (np.asarray(image) != key).astype(np.uint8) * 255
        return _opaque(image), Image.fromarray(opaque)
    if image.mode == "La":  # premultiplied, which Pillow converts to nothing but LA
        image = image.convert("LA")
    grey = image.getbands()[0] == "L"
    *bands, alpha = image.convert("RGBA").split()
    return (bands[0] if grey else Image.merge("RGB", bands)), alpha


def _opaque(image: Image.Image) -> Image.Image:
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
    """An 8-bit image as sRGB, mode RGB, through its embedded ICC profile (relative colorimetric, as browsers show it).

    Without a profile, or with one that is broken or describes another colour space than the pixels have, RGB and grey are held to
    be sRGB already, and CMYK is converted as plain inverse RGB. A profile that describes sRGB itself, which most photographs carry,
    is not applied: that would cost half as much as decoding the image, to move a colour in seven hundred by one level.
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
    except ImageCms.PyCMSError:  # a profile whose tables cannot be used in this direction
        return None


@lru_cache(maxsize=32)
def _describes_srgb(icc_profile: bytes) -> bool:
    """Whether a profile moves no colour, of 4,913 evenly spread ones, by more than one level."""
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
    except (OSError, ValueError):  # no profile at all, or bytes in its header where letters belong
        return None
    return profile if colour_space == _PROFILE_SPACES[mode] else None


def _scaled(values: np.ndarray, full_range: float) -> Image.Image:
    eight_bits = np.empty(values.shape, np.uint8)
    rows = max(1, _VALUES_AT_ONCE // max(values.shape[1], 1))
    for start in range(0, len(values), rows):  # so that a large image takes no eight bytes per pixel
        scaled = values[start : start + rows].astype(np.float64) * (255.0 / full_range)
        eight_bits[start : start + rows] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return Image.fromarray(eight_bits)
