"""Detection of corrupt data in the middle of an image, which Pillow ignores.

Pillow raises for missing data and little else: a JPEG with a run of zeros, as after a disk failure or an interrupted copy, silently
becomes an image that is grey or shifted from there on. libjpeg warns about it, and `simplejpeg` exposes that warning. A PNG has checksums
of its pixel data, which Pillow does not verify. The other formats have no checksums: only errors of their decoders are detected.
"""

import re
import struct
import zlib

import numpy as np

from sdxl_pipeline.data.decoding.image_decoding import CORRUPT, TRUNCATED

_PADDING_BYTES = 16
# libjpeg's warnings (jerror.h, JWRN_*) about coded data that no encoder writes
_JPEG_CORRUPTION = re.compile(
    "premature end of data segment|bad Huffman code|bad arithmetic code|instead of RST|"
    "(?P<truncated>Premature end of JPEG file)|(?P<bytes>[0-9]+) extraneous bytes before marker"
)


def decode_jpeg_small(data: bytes, smallest_edge: int) -> np.ndarray | str | None:
    """Return a JPEG's pixels as uint8 (H, W, 3) in its own RGB, at the smallest decodable scale with both edges >= `smallest_edge`.

    An image with a smaller edge is decoded at full scale. All coded data is read. A returned string is the reason why the image cannot
    be used; None means that libjpeg-turbo cannot decode it, which another decoder may.

    Nearly all runs of zeros are detected, nine of ten swapped sectors, and one of three flipped bits: decoding often resynchronizes, and
    then only some blocks are wrong. Some cameras and programs leave extra bytes at the end of valid images: up to 16 count as padding.
    Other warnings of libjpeg do not concern the pixels.
    """
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        size = {"min_height": min(smallest_edge, height), "min_width": min(smallest_edge, width)}
    except ValueError:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True, **size)
    except ValueError as error:
        warning = _JPEG_CORRUPTION.search(str(error))
        if warning is not None and int(warning["bytes"] or _PADDING_BYTES + 1) > _PADDING_BYTES:
            return TRUNCATED if warning["truncated"] else CORRUPT
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **size)
    except ValueError:
        return None


def png_corruption(data: bytes) -> str:
    """Return the reason if a pixel chunk of a PNG does not match its checksum (PNG, third edition, 5.3); else ""."""
    view = memoryview(data)
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        kind = data[position + 4 : position + 8]
        if kind == b"IEND" or end + 4 > len(data):
            break
        if kind == b"IDAT" and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return CORRUPT
        position = end + 4
    return ""
