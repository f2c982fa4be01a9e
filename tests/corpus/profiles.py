"""ICC profiles of colour spaces other than sRGB, and their conversion to sRGB without a colour library."""

import struct

import numpy as np
from PIL import ImageCms

# Columns: the primaries' XYZ under D50, as in the published profiles (Display P3: Apple 2022, Adobe RGB: 1998).
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_GAMMA = 563 / 256


def profile(primaries: np.ndarray, gamma: float | None = None) -> bytes:
    """Return an RGB profile with these primaries and the transfer curve of sRGB, or a power function."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * index)
        tags[name] = offset
    for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ")):
        fixed = [round(value * 65536) for value in primaries[:, column]]
        struct.pack_into(">iii", data, tags[name] + 8, *fixed)
    if gamma is not None:
        for name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHi", data, tags[name], b"para", 0, 0, 0, round(gamma * 65536))
    return bytes(data)


def to_srgb(pixels: np.ndarray, primaries: np.ndarray, gamma: float | None = None) -> np.ndarray:
    """Convert pixels of such a profile, uint8 (H, W, 3), to sRGB; colours outside its gamut are clipped."""
    values = pixels / 255.0
    if gamma is not None:
        linear = values**gamma
    else:
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ (np.linalg.inv(SRGB) @ primaries).T, 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)
