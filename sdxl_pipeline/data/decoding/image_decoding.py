"""Image decoding from bytes: format, size, completeness, or the reason why a file cannot be used.

Any error of a decoder becomes an UnreadableImage with a reason, so that one file does not stop the processing of the others.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from sdxl_pipeline.data.decoding import libtiff_errors
from sdxl_pipeline.data.decoding.image_formats import (
    FORMATS,
    HEAD_BYTES,
    MissingDecoderError,
    format_of,
    opener,
)
from sdxl_pipeline.data.decoding.memory_budget import pixel_memory

MAX_PIXELS = 178_956_970
"""Maximum pixels of an image (512 MiB of RGB), Pillow's default too. It guards against small files that decompress to more memory than
the machine has; images of 150 megapixel cameras are smaller."""
MAX_TEXT_BYTES: Final = 100 << 20
"""Maximum decompressed size of a PNG's text, XMP or ICC profile. Pillow's default of 1 MiB is below what editors write."""

CORRUPT, TRUNCATED = "corrupt image", "truncated"
SAMPLE_BITS: Final = "sample_bits"
"""Key of `Image.info`: bits per sample if a 16-bit mode holds samples of fewer bits."""

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
# Pillow's warnings about metadata lack the file name, and a file whose pixels cannot be used is reported with a reason.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_TOO_LARGE = (
    f"more than {MAX_PIXELS // 10**6} million pixels, too large to decode safely (a decompression bomb?)"
)
_NO_MEMORY = "not enough memory to decode it"
# Errors that decoders raise deliberately for a file that they cannot decode.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_NOT_FILE_ERRORS = (NotImplementedError, RecursionError)  # RuntimeErrors that are not caused by the file
_UNSUPPORTED = re.compile(
    r"unsupported|not (yet )?supported|unknown (?!error)|cannot handle|not available|unable to determine|cannot find loader|"
    "not implemented|codec configuration",
    re.IGNORECASE,
)
_TRUNCATED = re.compile(
    r"truncated|incomplete|not enough (image )?data|only got \d+|reached eof|unexpected end|end of file",
    re.IGNORECASE,
)
_FORMAT_NAMES = {"MPO": "JPEG", "PPM": "PNM"}
# A PNG may have its orientation after the pixels, where Pillow finds it only by decoding them; so search for these chunks first.
_PNG_EXIF = b"eXIf"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")
_PNG_BIT_DEPTH_OFFSET = 24  # offset of the bits per sample in a PNG's header
# Transposition that makes an image upright, by its EXIF orientation (CIPA DC-008, tag 0x0112); 5 to 8 swap width and height.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):  # noqa: N818 - describes the state of the file rather than a program error
    """A file that cannot be used as an image. `reason` is a short text, equal for files with the same problem."""

    def __init__(self, reason: str, permanent: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent
        """Whether the same content will fail again; False for a failure of this program or machine."""


@dataclass(frozen=True)
class ImageHeader:
    """Size in pixels after the EXIF orientation, and format of an image."""

    height: int
    width: int
    format: str


@contextmanager
def unexpected_as_unreadable() -> Iterator[None]:
    """Convert any error in the processing of one file to UnreadableImage, so that the file is reported and the others continue.

    A lack of memory is attributed to the file: large files are decoded one at a time, so the next one may fit. Interrupts
    (KeyboardInterrupt, SystemExit, Dagster's) propagate; a panic of a decoder written in Rust, which derives from BaseException too,
    is converted.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except OSError as error:
        raise UnreadableImage(
            f"cannot be read: {error.strerror or _single_line(error)}", permanent=False
        ) from error
    except MemoryError as error:
        raise UnreadableImage(_NO_MEMORY, permanent=False) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        text = f"{type(error).__name__}: {_single_line(error)}".rstrip(": ")
        raise UnreadableImage(f"unexpected error while decoding it: {text}", permanent=False) from error


@unexpected_as_unreadable()
def read_header(data: bytes | BinaryIO) -> ImageHeader:
    """Return size and format of the image in `data`, after checking that the file is complete.

    The check parses the container's structure, which is cheap; the first frame is decoded only if the structure seems incomplete or
    the format has none, or if `data` is an open file, as for images too large to hold in memory. Raises UnreadableImage.
    """
    with open_image(data) as image:
        name = _format_name(image)
        if not isinstance(data, bytes) or not _is_complete(data, name):
            with pixel_memory(image):
                decode(image)
                height, width = _upright_size(image, data)
        else:
            height, width = _upright_size(image, data)
    return ImageHeader(height, width, name)


def open_image(data: bytes | BinaryIO) -> ImageFile.ImageFile:
    """Return the image in `data` (bytes or an open file) at its first frame, not decoded yet.

    Raises UnreadableImage for content that is not an image of a format in FORMATS, and for more than MAX_PIXELS.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    head = file.read(HEAD_BYTES)
    if not head:
        raise UnreadableImage("empty file")
    name = format_of(head)
    if name not in FORMATS:
        raise UnreadableImage(f"image format {name} is not supported" if name else "content is not an image")
    try:
        factory = opener(name, head)
    except MissingDecoderError as error:
        raise UnreadableImage(str(error), permanent=False) from error
    file.seek(0)
    try:
        # The decoder is called directly: Image.open warns about each image above half of MAX_PIXELS, and other code in this
        # process may change its limit.
        image = factory(file, "")
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_TOO_LARGE) from error
    except _NOT_FILE_ERRORS:
        raise
    except _DECODER_ERRORS as error:
        raise _unreadable(error, name, _is_truncated(file, name)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels are {_TOO_LARGE}")
    _record_sample_info(image, head)
    return image


def decode(image: ImageFile.ImageFile) -> None:
    """Decode the pixels of the current frame. Raise UnreadableImage for a file that cannot be decoded, or with NaN or infinite pixels."""
    libtiff_errors.clear()
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_TOO_LARGE) from error
    except _NOT_FILE_ERRORS:
        raise
    except _DECODER_ERRORS as error:
        raise _unreadable(error, _format_name(image)) from error
    function, error_text = libtiff_errors.first_error()
    if "Decode" in function:  # invalid codes in a line, which Pillow does not report
        raise UnreadableImage(f"{CORRUPT} ({function}: {error_text})")
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise UnreadableImage("some of its pixels are NaN or infinite")


def upright(image: Image.Image) -> Image.Image:
    """Return a decoded image rotated and mirrored by its EXIF orientation."""
    transposition = _TRANSPOSITIONS.get(_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def _unreadable(error: Exception, name: str, truncated: bool = False) -> UnreadableImage:
    """Return the reason for a decoder's error; CORRUPT only if neither a limit nor an unsupported feature is the cause."""
    message = _single_line(error)
    # The TIFF plugin raises KeyError for an unknown compression; Pillow's base class converts it to SyntaxError.
    missing = isinstance(error.__cause__ or error, KeyError)
    if truncated or _TRUNCATED.search(message):
        return UnreadableImage(TRUNCATED)
    if "MAX_TEXT" in message:
        return UnreadableImage(f"more than {MAX_TEXT_BYTES >> 20} MiB of text or profiles in a PNG")
    if "out of memory" in message:
        return UnreadableImage(_NO_MEMORY, permanent=False)
    if missing or _UNSUPPORTED.search(message):
        return UnreadableImage(f"unsupported kind of {name}: {message}")
    reported = ": ".join(filter(None, libtiff_errors.first_error())) if name == "TIFF" else ""
    return UnreadableImage(f"{CORRUPT} ({reported})" if reported else CORRUPT)


def _single_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _format_name(image: ImageFile.ImageFile) -> str:
    # a JPEG of a phone with a second image is opened as MPO
    return _FORMAT_NAMES.get(str(image.format), str(image.format))


def _record_sample_info(image: ImageFile.ImageFile, head: bytes) -> None:
    """Add the bits per sample and the 8-bit transparent value, which Pillow does not provide, to `image.info`."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        image.info[SAMPLE_BITS] = int(image.tag_v2.get(258, (16,))[0])  # type: ignore[attr-defined]
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    bits = head[_PNG_BIT_DEPTH_OFFSET]
    if image.mode == "L":
        largest = (1 << bits) - 1
        image.info["transparency"] = (key & largest) * 255 // largest
    elif image.mode == "RGB" and bits == 16:  # Pillow keeps only the upper 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright_size(image: ImageFile.ImageFile, data: bytes | BinaryIO) -> tuple[int, int]:
    height, width = image.height, image.width
    if image.format == "TIFF":  # Pillow transposes these itself, and reports the upright size
        return height, width
    if image.format == "PNG" and isinstance(data, bytes) and not _png_may_have_orientation(data):
        return height, width
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # the decoder applies the orientation; that in EXIF is to be ignored (ISO/IEC 18181-2)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # the pixels may be valid even if the metadata is not
        return 1
    return orientation if orientation in _TRANSPOSITIONS else 1


def _is_complete(data: bytes, format_name: str) -> bool:
    match format_name:
        case "PNG":
            return any(kind == b"IEND" for kind, _ in _png_chunks(data))
        case "JPEG":
            return _jpeg_complete(data)
        case "WEBP":
            return _webp_complete(data, len(data))
        case "AVIF" | "HEIF":
            return _boxes_end(io.BytesIO(data)) == len(data)
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")  # the trailer, which some writers pad
    return False


def _is_truncated(file: BinaryIO, name: str) -> bool:
    """Return whether a file is shorter than its own structure implies."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(HEAD_BYTES)
    match name:
        case "PNG":
            file.seek(0)
            return not _is_complete(file.read(), name)
        case "WEBP":
            return not _webp_complete(head, size)
        case "TIFF" if len(head) >= 8:
            order = "<" if head.startswith(b"II") else ">"
            big = head[2:4] in (b"+\0", b"\0+")
            return bool(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0] >= size)
        case "AVIF" | "HEIF":
            return _boxes_end(file) > size
    return size < 16


def _boxes_end(file: BinaryIO) -> int:
    """Return the end of the boxes of an ISO media file by their lengths; 0 if the last one has none."""
    size = file.seek(0, io.SEEK_END)
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:
            return 0
        position += length
    return position if position >= size else size + 1


def _png_may_have_orientation(data: bytes) -> bool:
    return any(
        kind == _PNG_EXIF or (kind in _PNG_TEXTS and data.startswith(_PNG_EXIF_TEXTS, start))
        for kind, start in _png_chunks(data)
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the type of each chunk and the offset of its content; the last chunk may be truncated."""
    position = 8
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        yield kind, position + 8
        if kind == b"IEND":
            return
        # length, type, content, checksum
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _jpeg_complete(data: bytes) -> bool:
    # An embedded thumbnail has its own end marker, so skip the segments before searching for that of the image.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; 0xFF is always stuffed in the coded data that follows
            return data.rfind(b"\xff\xd9", position) != -1  # from the end, where it almost always is
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return False


def _webp_complete(start: bytes, size: int) -> bool:
    return len(start) >= 12 and struct.unpack_from("<I", start, 4)[0] + 8 <= size
