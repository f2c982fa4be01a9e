"""Where the real photographs are, and how the tests save and compare images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
"""The photographs shipped in scikit-image's wheel."""


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """The bytes of `image` saved in a format."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def values(image: Image.Image | np.ndarray) -> np.ndarray:
    """Pixels as signed integers, so that they can be subtracted."""
    return np.asarray(image).astype(int)
