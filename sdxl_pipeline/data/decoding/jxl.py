"""JPEG XL through pillow-jxl-plugin (the optional extra `jxl`), with lazy decoding.

The plugin decodes a file when it is opened. The size is needed before that, to reject images that are too large and to reserve memory.
"""

from typing import Any, Final

from PIL import Image
from pillow_jxl import JpegXLImagePlugin

_CONTAINER: Final = b"\0\0\0\x0cJXL "
_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_EDGE_BITS: Final = (9, 13, 18, 30)

JpegXLImagePlugin.DECODE_THREADS = 0  # several files are decoded in parallel


class JxlImageFile(JpegXLImagePlugin.JXLImageFile):
    """A JPEG XL image. Its mode is known only after `load`."""

    _decoded = False

    def _open(self) -> None:
        self._size = size_of(self.fp.read())
        self._mode = "RGB"
        self.fp.seek(0)

    def load(self) -> Any:
        """Decode the image."""
        if not self._decoded:
            self._decoded = True
            super()._open()
        return super().load()


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height in a JPEG XL file's header (ISO/IEC 18181-1, SizeHeader). Raise ValueError if it is truncated."""
    start = _codestream_offset(data) if data.startswith(_CONTAINER) else 0
    if data[start : start + 2] != b"\xff\x0a" or len(data) < start + 12:
        raise ValueError("truncated JPEG XL header")
    bits = int.from_bytes(data[start + 2 : start + 12], "little")

    def read_bits(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    is_small = read_bits(1)

    def read_edge() -> int:
        return (read_bits(5) + 1) * 8 if is_small else read_bits(_EDGE_BITS[read_bits(2)]) + 1

    height = read_edge()
    ratio = read_bits(3)
    if not ratio:
        return read_edge(), height
    over, under = _RATIOS[ratio - 1]
    return height * over // under, height


def _codestream_offset(data: bytes) -> int:
    """Return the offset of the coded image in a container: in the box `jxlc`, or in the first `jxlp` after its index."""
    position = 0
    while position + 16 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        header = 8
        if size == 1:
            size, header = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return position + header + (4 if kind == b"jxlp" else 0)
        if size < header:
            break
        position += size
    raise ValueError("truncated JPEG XL container")


Image.register_open("JXL", JxlImageFile, JpegXLImagePlugin._accept)
