"""Image formats: which are read, what identifies their content and file names, and which package decodes them.

The content decides what a file is; a name only decides whether a file is looked at.
"""

import importlib
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from PIL import Image, ImageFile

HEAD_BYTES: Final = 64
"""How much of a file `format_of` needs."""


@dataclass(frozen=True)
class ImageFormat:
    """A format that is read. `name` is the one that the scan's column `format` shows."""

    name: str
    suffixes: tuple[str, ...]
    """In lower case, the usual one first."""
    plugin: str = ""
    """Pillow's name of the decoder, where it is another one."""
    module: str = ""
    """The module that brings the decoder: one of Pillow's, unless there is an `extra`."""
    extra: str = ""
    """The optional dependency of this project that brings it."""


FORMATS: Final = {
    image_format.name: image_format
    for image_format in (
        ImageFormat("PNG", (".png", ".apng"), module="PIL.PngImagePlugin"),
        ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), module="PIL.JpegImagePlugin"),
        ImageFormat("WEBP", (".webp",), module="PIL.WebPImagePlugin"),
        ImageFormat("AVIF", (".avif", ".avifs"), module="PIL.AvifImagePlugin"),
        ImageFormat("GIF", (".gif",), module="PIL.GifImagePlugin"),
        ImageFormat("BMP", (".bmp",), module="PIL.BmpImagePlugin"),
        ImageFormat("DIB", (".dib",), module="PIL.BmpImagePlugin"),
        ImageFormat("TIFF", (".tif", ".tiff"), module="PIL.TiffImagePlugin"),
        ImageFormat("PNM", (".ppm", ".pgm", ".pbm", ".pnm"), "PPM", "PIL.PpmImagePlugin"),
        ImageFormat("TGA", (".tga", ".icb", ".vda", ".vst"), module="PIL.TgaImagePlugin"),
        ImageFormat(
            "JPEG2000",
            (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
            module="PIL.Jpeg2KImagePlugin",
        ),
        ImageFormat("HEIF", (".heic", ".heif", ".hif"), module="pillow_heif", extra="heif"),
        ImageFormat("JXL", (".jxl",), module="sdxl_pipeline.data.decoding.jxl", extra="jxl"),
    )
}
"""The formats that are read, by name. No other decoder of Pillow's is given a user's file."""

IMAGE_SUFFIXES: Final = frozenset(suffix for known in FORMATS.values() for suffix in known.suffixes)
OTHER_SUFFIXES: Final = frozenset(
    {".psd", ".svg", ".exr", ".hdr", ".ico", ".pfm", ".pam", ".qoi"}
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}
)
"""Names of image files that are not read."""

_SIGNATURES: Final = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((mark, "TIFF") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((struct.pack("<I", size), "DIB") for size in (12, 40, 52, 56, 64, 108, 124)),
    *((b"P%d" % kind + space, "PNM") for kind in range(1, 7) for space in (b"\n", b"\r", b" ", b"\t", b"#")),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL ", "JXL"),
    (b"\xff\x0a", "JXL"),
    # these are recognized so that they are reported as what they are
    (b"8BPS", "PSD"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\0\0\1\0", "ICO"),
    (b"qoif", "QOI"),
    (b"<svg", "SVG"),
)
_AVIF_BRANDS, _HEIF_BRANDS = (
    frozenset({b"avif", b"avis"}),
    frozenset({b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}),
)


class MissingDecoderError(Exception):
    """A format whose decoder is not there. The message names the format and what to install."""


class Opener(Protocol):
    """What makes an image of an open file, its pixels not decoded yet."""

    def __call__(self, file: BinaryIO, name: str, /) -> ImageFile.ImageFile: ...  # noqa: D102


def format_of(head: bytes) -> str:
    """Return the name of the format that begins with `head` (HEAD_BYTES of a file), in FORMATS or not; "" for no known one."""
    if head[4:8] == b"ftyp":
        return _iso_format(head)
    if head.startswith(b"RIFF"):
        return "WEBP" if head[8:12] == b"WEBP" else ""
    found = next((name for signature, name in _SIGNATURES if head.startswith(signature)), "")
    return found or ("TGA" if _is_tga(head) else "")


def suffix_of(head: bytes) -> str:
    """Return the usual suffix for a file that begins with `head`; "" when it is of no format that is read."""
    known = FORMATS.get(format_of(head))
    return "" if known is None else known.suffixes[0]


def opener(name: str, head: bytes) -> Opener:
    """Return the decoder of a format of FORMATS for a file that begins with `head`. Raises MissingDecoderError."""
    known = FORMATS[name]
    try:
        module = importlib.import_module(known.module)
    except ImportError as error:
        if not known.extra:
            raise
        raise MissingDecoderError(
            f"{name} needs an optional package: pip install 'sdxl-pipeline[{known.extra}]'"
        ) from error
    if name == "HEIF":
        found: Opener = module.HeifImageFile
        return found
    factory, accept = Image.OPEN[known.plugin or name]
    # Pillow's plugins say in words what their build lacks.
    if accept is not None and isinstance(lacking := accept(head), str):
        raise MissingDecoderError(f"{name} cannot be decoded by this build of Pillow ({lacking})")
    return factory


def _iso_format(head: bytes) -> str:
    """Which of the formats in ISO media containers, by the brands that the file names as compatible."""
    size = int.from_bytes(head[:4], "big")
    listed = head[8 : min(max(size, 12), len(head))]
    brands = {listed[start : start + 4] for start in range(0, len(listed), 4)}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else ""


def _is_tga(head: bytes) -> bool:
    """Whether a file without any signature has the header of a Targa image, in every field."""
    if len(head) < 18:
        return False
    _, has_map, kind, first, length, entry, _, _, width, height, depth, flags = struct.unpack_from(
        "<BBBHHBHHHHBB", head
    )
    depths = {1: (8,), 2: (16, 24, 32), 3: (8, 16)}.get(kind & ~8 if kind <= 11 else 0, ())
    mapped = has_map == 1 and entry in (15, 16, 24, 32) and 0 < length <= 256 and first < 256
    plain = has_map == 0 and first == length == 0
    matches = mapped if kind & ~8 == 1 else plain
    return matches and depth in depths and width > 0 and height > 0 and flags & 0xC0 == 0
