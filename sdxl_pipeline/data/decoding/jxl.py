"""JPEG XL through pillow-jxl-plugin (the optional extra `jxl`), whose pixels are decoded when they are asked for and not before.

The plugin decodes a file when it is opened. Its size is needed earlier: to refuse one that is too large, and to reserve memory.
"""

from typing import Any, Final

from PIL import Image
from pillow_jxl import JpegXLImagePlugin

_CONTAINER: Final = b"\0\0\0\x0cJXL "
_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_LENGTHS: Final = (9, 13, 18, 30)

JpegXLImagePlugin.DECODE_THREADS = 0  # whole files are decoded in parallel


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
    """Return the stored width and height in a JPEG XL file's header (ISO/IEC 18181-1, SizeHeader). Raises ValueError."""
    start = _codestream(data) if data.startswith(_CONTAINER) else 0
    if data[start : start + 2] != b"\xff\x0a" or len(data) < start + 12:
        raise ValueError("truncated JPEG XL header")
    bits = int.from_bytes(data[start + 2 : start + 12], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def edge() -> int:
        return (take(5) + 1) * 8 if small else take(_LENGTHS[take(2)]) + 1

    height = edge()
    ratio = take(3)
    if not ratio:
        return edge(), height
    over, under = _RATIOS[ratio - 1]
    return height * over // under, height


def _codestream(data: bytes) -> int:
    """Where the coded image begins in a container: in the box `jxlc`, or the first `jxlp`, behind its number."""
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
