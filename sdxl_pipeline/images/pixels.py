"""The pixels a crop is trained on: 8-bit sRGB, upright, opaque, resampled once."""

from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.images.colour import to_eight_bits, to_srgb
from sdxl_pipeline.images.crops import Crop
from sdxl_pipeline.images.decoding import UnreadableImage, decode, open_picture, upright


def load_crop(path: Path, crop: Crop) -> np.ndarray:
    """The planned crop of the picture at `path`: uint8 sRGB of shape (bucket_h, bucket_w, 3).

    `crop` may be anything with Crop's attributes, such as a row of the plan from `itertuples`. The window is resampled once, by
    Lanczos, straight from the full-size picture: the same pixels as resizing the whole and cutting the window, for less work.

    Raises UnreadableImage when the file cannot be read or decoded, or is no longer of the size it was planned for.
    """
    with _open(path) as image:
        icc_profile = image.info.get("icc_profile")
        picture = to_eight_bits(upright(image))
    if (picture.height, picture.width) != (crop.original_h, crop.original_w):
        raise UnreadableImage(
            f"changed since the scan: {picture.width}x{picture.height} pixels, "
            f"planned at {crop.original_w}x{crop.original_h}"
        )
    scale_h = crop.original_h / crop.resized_h
    scale_w = crop.original_w / crop.resized_w
    window = (
        crop.crop_left * scale_w,
        crop.crop_top * scale_h,
        (crop.crop_left + crop.bucket_w) * scale_w,
        (crop.crop_top + crop.bucket_h) * scale_h,
    )
    # the product above may end a rounding error outside the picture, which Pillow refuses
    window = (*window[:2], min(window[2], picture.width), min(window[3], picture.height))
    cut = picture.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.LANCZOS, box=window)
    return np.asarray(to_srgb(cut, icc_profile))


def load_upright(path: Path, longest_edge: int | None = None) -> Image.Image:
    """The whole picture as it is meant to be seen, in mode RGB (sRGB), shrunk so that no edge exceeds `longest_edge`.

    Raises UnreadableImage.
    """
    with _open(path) as image:
        icc_profile = image.info.get("icc_profile")
        picture = to_eight_bits(upright(image))
    if longest_edge is not None:
        picture.thumbnail((longest_edge, longest_edge), Image.Resampling.LANCZOS)
    return to_srgb(picture, icc_profile)


def _open(path: Path) -> Image.Image:
    """The decoded first frame."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from error
    image = open_picture(data)
    decode(image)
    return image
