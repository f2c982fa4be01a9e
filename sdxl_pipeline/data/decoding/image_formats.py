"""Supported image formats: their signatures, file names, and the packages that decode them.

The format of a file is that of its content; its name only decides whether it is read.
"""

import importlib
import struct
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

from PIL import Image, ImageFile

HEAD_BYTES: Final = 64
"""Number of bytes of a file that `format_of` needs."""


@dataclass(frozen=True)
class ImageFormat:
    """A supported format. `name` is its value in the scan's column `format`."""

    name: str
    suffixes: tuple[str, ...]
    """Lower-case suffixes, the usual one first."""
    plugin: str = ""
    """Pillow's name of the decoder if it differs from `name`."""
    module: str = ""
    """Module of the decoder: one of Pillow's unless there is an `extra`."""
    extra: str = ""
    """Optional dependency of this project that installs it."""


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
"""Supported formats by name. No other decoder of Pillow is used."""

IMAGE_SUFFIXES: Final = frozenset(
    suffix for image_format in FORMATS.values() for suffix in image_format.suffixes
)
OTHER_SUFFIXES: Final = frozenset(
    {".psd", ".svg", ".exr", ".hdr", ".ico", ".pfm", ".pam", ".qoi"}
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}
)
"""Suffixes of image formats that are not supported."""

_SIGNATURES: Final = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((mark, "TIFF") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((struct.pack("<I", size), "DIB") for size in (12, 40, 52, 56, 64, 108, 124)),
    *(
        (b"P%d" % variant + space, "PNM")
        for variant in range(1, 7)
        for space in (b"\n", b"\r", b" ", b"\t", b"#")
    ),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cJXL ", "JXL"),
    (b"\xff\x0a", "JXL"),
    # unsupported, recognized for the reason in the report
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
    """A format whose decoder is not installed. The message has the format and the package to install."""


class Opener(Protocol):
    """Callable that returns the image of an open file, not decoded yet."""

    def __call__(self, file: BinaryIO, name: str, /) -> ImageFile.ImageFile: ...  # noqa: D102


def format_of(head: bytes) -> str:
    """Return the format of a file from its first HEAD_BYTES, supported or not; "" if it is unknown."""
    if head[4:8] == b"ftyp":
        return _iso_format(head)
    if head.startswith(b"RIFF"):
        return "WEBP" if head[8:12] == b"WEBP" else ""
    known = next((name for signature, name in _SIGNATURES if head.startswith(signature)), "")
    return known or ("TGA" if _is_tga(head) else "")


def suffix_of(head: bytes) -> str:
    """Return the usual suffix for a file that begins with `head`; "" if its format is not supported."""
    image_format = FORMATS.get(format_of(head))
    return "" if image_format is None else image_format.suffixes[0]


def opener(name: str, head: bytes) -> Opener:
    """Return the decoder of a format in FORMATS for a file that begins with `head`. Raise MissingDecoderError if it is not installed."""
    image_format = FORMATS[name]
    try:
        module = importlib.import_module(image_format.module)
    except ImportError as error:
        if not image_format.extra:
            raise
        raise MissingDecoderError(
            f"{name} needs an optional package: pip install 'sdxl-pipeline[{image_format.extra}]'"
        ) from error
    if name == "HEIF":
        decoder: Opener = module.HeifImageFile
        return decoder
    factory, accept = Image.OPEN[image_format.plugin or name]
    # Pillow's plugins return the feature that their build lacks as text.
    if accept is not None and isinstance(missing_feature := accept(head), str):
        raise MissingDecoderError(f"{name} cannot be decoded by this build of Pillow ({missing_feature})")
    return factory


def _iso_format(head: bytes) -> str:
    """Return the format of an ISO media container by its compatible brands."""
    size = int.from_bytes(head[:4], "big")
    brand_list = head[8 : min(max(size, 12), len(head))]
    brands = {brand_list[start : start + 4] for start in range(0, len(brand_list), 4)}
    return "AVIF" if brands & _AVIF_BRANDS else "HEIF" if brands & _HEIF_BRANDS else ""


def _is_tga(head: bytes) -> bool:
    """Return whether every header field is valid for a Targa image, which has no signature."""
    if len(head) < 18:
        return False
    _, has_map, variant, first, length, entry, _, _, width, height, depth, flags = struct.unpack_from(
        "<BBBHHBHHHHBB", head
    )
    depths = {1: (8,), 2: (16, 24, 32), 3: (8, 16)}.get(variant & ~8 if variant <= 11 else 0, ())
    mapped = has_map == 1 and entry in (15, 16, 24, 32) and 0 < length <= 256 and first < 256
    plain = has_map == 0 and first == length == 0
    matches = mapped if variant & ~8 == 1 else plain
    return matches and depth in depths and width > 0 and height > 0 and flags & 0xC0 == 0
