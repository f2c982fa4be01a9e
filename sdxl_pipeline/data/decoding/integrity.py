"""Damage in the middle of an image's data, which Pillow glosses over.

Pillow raises at missing data, and at little else: a JPEG with a hole of zeros in it, as a failing disk or a broken copy leaves behind,
becomes without complaint an image that is grey or shifted from there on. libjpeg notices, and warns; `simplejpeg` hands that warning
on. A PNG has checksums over its pixels, which Pillow does not compare. The other formats have nothing to compare with: of those, only
what their decoders refuse is found.
"""

import re
import struct
import zlib

import numpy as np

from sdxl_pipeline.data.decoding.image_decoding import DAMAGED, TRUNCATED

_PADDING_BYTES = 16
# libjpeg's warnings (jerror.h, JWRN_*) about coded data that is not what any encoder writes
_JPEG_DAMAGE = re.compile(
    "premature end of data segment|bad Huffman code|bad arithmetic code|instead of RST|"
    "(?P<truncated>Premature end of JPEG file)|(?P<bytes>[0-9]+) extraneous bytes before marker"
)


def decode_jpeg_small(data: bytes, smallest_edge: int) -> np.ndarray | str | None:
    """A JPEG's pixels, uint8 (H, W, 3) in its own RGB, as few as its coding allows with no edge below `smallest_edge` or its own.

    The whole of the coded data is read for it. A text is the reason why the image cannot be used; None says that libjpeg-turbo
    cannot give it so, which another decoder may.

    About every hole of zeros is found, nine of ten exchanged sectors, and one of three flipped bits: decoding often falls into step
    again, and then only some blocks are wrong. Some cameras and programs leave a few bytes over at the end of sound images: up
    to 16 are taken for padding. Other warnings of libjpeg say nothing about the pixels.
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
        found = _JPEG_DAMAGE.search(str(error))
        if found is not None and int(found["bytes"] or _PADDING_BYTES + 1) > _PADDING_BYTES:
            return TRUNCATED if found["truncated"] else DAMAGED
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **size)
    except ValueError:
        return None


def png_damage(data: bytes) -> str:
    """Why a PNG cannot be used, when a chunk of its pixels differs from its checksum (PNG, third edition, 5.3); else empty."""
    view = memoryview(data)
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        kind = data[position + 4 : position + 8]
        if kind == b"IEND" or end + 4 > len(data):
            break
        if kind == b"IDAT" and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return DAMAGED
        position = end + 4
    return ""
