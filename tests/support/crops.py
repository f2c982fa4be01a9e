"""Crops of full images, and images stored with an EXIF orientation."""

import numpy as np
from PIL import Image

from sdxl_pipeline.data.buckets.crop_plan import Crop

ORIENTATION = 0x0112
"""EXIF tag of the orientation."""


def full_crop(height: int, width: int, **changes: int) -> Crop:
    """Return the crop that covers a full image at its own size."""
    sizes = {name: height if name.endswith("_h") else width for name in Crop.__dataclass_fields__}
    sizes["flipped"] = False
    return Crop(**(sizes | {"crop_top": 0, "crop_left": 0} | changes))


def stored_with_orientation(orientation: int, image: Image.Image) -> Image.Image:
    """Return the stored pixels that this EXIF orientation transforms to `image`: the inverse transposition."""
    array = np.asarray(image)
    inverse = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, 1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array, -1),
    }
    return Image.fromarray(np.ascontiguousarray(inverse[orientation]))
