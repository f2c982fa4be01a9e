"""Opening images from their bytes: which format, how large, whether complete, and why not.

Whatever a decoder raises becomes an UnreadableImage with a reason, so that one file never stops the work on the others.
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
"""The largest image that is decoded, to 512 MiB of RGB: Pillow's own limit too. A small file may unpack to more memory than the
machine has; cameras of 150 megapixels stay below."""
MAX_TEXT_BYTES: Final = 100 << 20
"""The most that a PNG's text, XMP or ICC profile may unpack to. Pillow's own limit of 1 MiB is below what editors write."""

DAMAGED, TRUNCATED = "damaged image", "truncated"
SAMPLE_BITS: Final = "sample_bits"
"""Key of `Image.info`: the bits of a sample, where a mode of 16 bits holds samples of fewer."""

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
# Pillow's remarks on metadata name no file, and a file whose pixels cannot be used is reported with a reason.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_TOO_LARGE = (
    f"more than {MAX_PIXELS // 10**6} million pixels, too large to decode safely (a decompression bomb?)"
)
_NO_MEMORY = "not enough memory to decode it"
# What decoders raise on purpose for a file they cannot use.
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
_NO_DECODER_ERRORS = (NotImplementedError, RecursionError)  # RuntimeErrors that say nothing of the file
_UNSUPPORTED = re.compile(
    r"unsupported|not (yet )?supported|unknown (?!error)|cannot handle|not available|unable to determine|cannot find loader|"
    "not implemented|codec configuration",
    re.IGNORECASE,
)
_CUT = re.compile(
    r"truncated|incomplete|not enough (image )?data|only got \d+|reached eof|unexpected end|end of file",
    re.IGNORECASE,
)
_FORMAT_NAMES = {"MPO": "JPEG", "PPM": "PNM"}
# A PNG may carry its orientation after the pixels, where Pillow finds it only by decoding them; so look for these chunks first.
_PNG_EXIF = b"eXIf"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")
_PNG_DEPTH = 24  # where a PNG's header has the bits of a sample
# How to turn an image upright, by its EXIF orientation (CIPA DC-008, tag 0x0112); 5 to 8 swap width and height.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):  # noqa: N818 - names the state of the file, not a fault of the program
    """A file that gives no image. `reason` is a short text, which files of the same kind share."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        """Whether the same content will fail again; False for a failure of this program or machine."""


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image without decoding it. Sizes in pixels, after the EXIF orientation."""

    height: int
    width: int
    format: str


@contextmanager
def unexpected_as_unreadable() -> Iterator[None]:
    """Turn anything that work on one file raises into UnreadableImage, so that the file is reported and the others go on.

    A lack of memory counts as the file's own: large files are decoded in turn, so the next one may well fit. What stops a program
    (KeyboardInterrupt, SystemExit, Dagster's interrupts) passes; a panic of a decoder written in Rust, which derives from
    BaseException too, does not.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except OSError as error:
        raise UnreadableImage(
            f"cannot be read: {error.strerror or _one_line(error)}", lasting=False
        ) from error
    except MemoryError as error:
        raise UnreadableImage(_NO_MEMORY, lasting=False) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        text = f"{type(error).__name__}: {_one_line(error)}".rstrip(": ")
        raise UnreadableImage(f"unexpected error while decoding it: {text}", lasting=False) from error


@unexpected_as_unreadable()
def read_header(data: bytes | BinaryIO) -> ImageHeader:
    """Return size and format of the image in `data`, after checking that the file is complete.

    The container's structure is checked, which costs next to nothing; only when that looks incomplete, or has none to check, is
    the first frame decoded. That is also done when `data` is an open file, which is for those too large to hold in memory.
    Raises UnreadableImage.
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
    """Return the image in `data` (bytes or an open file) at its first frame, its pixels not decoded yet.

    Raises UnreadableImage for what is no image of a format of FORMATS, and for one of more than MAX_PIXELS.
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
        raise UnreadableImage(str(error), lasting=False) from error
    file.seek(0)
    try:
        # The decoder is called directly: Image.open warns of each image above half of MAX_PIXELS, and any other code of this
        # process may move its limit.
        image = factory(file, "")
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_TOO_LARGE) from error
    except _NO_DECODER_ERRORS:
        raise
    except _DECODER_ERRORS as error:
        raise _unreadable(error, name, _ends_early(file, name)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels are {_TOO_LARGE}")
    _note_samples(image, head)
    return image


def decode(image: ImageFile.ImageFile) -> None:
    """Decode the pixels of the current frame. Raises UnreadableImage for a file that cannot be decoded, and for pixels that are NaN."""
    libtiff_errors.clear()
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_TOO_LARGE) from error
    except _NO_DECODER_ERRORS:
        raise
    except _DECODER_ERRORS as error:
        raise _unreadable(error, _format_name(image)) from error
    function, error_text = libtiff_errors.first_error()
    if "Decode" in function:  # the codes of a line are wrong, and Pillow was not told
        raise UnreadableImage(f"{DAMAGED} ({function}: {error_text})")
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise UnreadableImage("some of its pixels are NaN or infinite")


def upright(image: Image.Image) -> Image.Image:
    """Return a decoded image as it is meant to be seen: turned and mirrored by its EXIF orientation."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _unreadable(error: Exception, name: str, cut: bool = False) -> UnreadableImage:
    """Why a decoder refused a file. Damage is only reported where neither a limit nor something unsupported is the cause."""
    message = _one_line(error)
    # Pillow's base class turns these into SyntaxError; TIFF's plugin looks its compressions up in a dictionary.
    missing = isinstance(error.__cause__ or error, KeyError)
    if cut or _CUT.search(message):
        return UnreadableImage(TRUNCATED)
    if "MAX_TEXT" in message:
        return UnreadableImage(f"more than {MAX_TEXT_BYTES >> 20} MiB of text or profiles in a PNG")
    if "out of memory" in message:
        return UnreadableImage(_NO_MEMORY, lasting=False)
    if missing or _UNSUPPORTED.search(message):
        return UnreadableImage(f"unsupported kind of {name}: {message}")
    reported = ": ".join(filter(None, libtiff_errors.first_error())) if name == "TIFF" else ""
    return UnreadableImage(f"{DAMAGED} ({reported})" if reported else DAMAGED)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _format_name(image: ImageFile.ImageFile) -> str:
    # a phone's JPEG with a second image behind the first is opened as MPO
    return _FORMAT_NAMES.get(str(image.format), str(image.format))


def _note_samples(image: ImageFile.ImageFile, head: bytes) -> None:
    """Write into `image.info` what Pillow knows of samples and does not apply: their bits, and the transparent value in 8 bits."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        image.info[SAMPLE_BITS] = int(image.tag_v2.get(258, (16,))[0])  # type: ignore[attr-defined]
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return
    bits = head[_PNG_DEPTH]
    if image.mode == "L":
        largest = (1 << bits) - 1
        image.info["transparency"] = (key & largest) * 255 // largest
    elif image.mode == "RGB" and bits == 16:  # of which Pillow keeps the upper halves
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _upright_size(image: ImageFile.ImageFile, data: bytes | BinaryIO) -> tuple[int, int]:
    height, width = image.height, image.width
    if image.format == "TIFF":  # Pillow turns these itself, and gives their upright size from the start
        return height, width
    if image.format == "PNG" and isinstance(data, bytes) and not _png_may_be_turned(data):
        return height, width
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # its decoder has turned it, and the EXIF orientation is a leftover (ISO/IEC 18181-2)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # broken metadata says nothing about the pixels, which may be sound
        return 1
    return orientation if orientation in _TURNS else 1


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
            return data.rstrip(b"\0").endswith(b";")  # the trailer; some writers pad after it
    return False


def _ends_early(file: BinaryIO, name: str) -> bool:
    """Whether a file, by its own structure, should be longer than it is."""
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
    """Where the boxes of an ISO media file end, by their lengths; 0 when the last one does not tell."""
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


def _png_may_be_turned(data: bytes) -> bool:
    return any(
        kind == _PNG_EXIF or (kind in _PNG_TEXTS and data.startswith(_PNG_EXIF_TEXTS, start))
        for kind, start in _png_chunks(data)
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The type of each chunk, and where its content begins; the last one may be cut."""
    position = 8
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        yield kind, position + 8
        if kind == b"IEND":
            return
        position += 12 + int.from_bytes(
            data[position : position + 4], "big"
        )  # length, type, content, checksum


def _jpeg_complete(data: bytes) -> bool:
    # An embedded thumbnail has an end marker of its own, so step over the segments before looking for the image's.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; in the coded data that follows 0xFF is always stuffed
            return data.rfind(b"\xff\xd9", position) != -1  # sought from the end, where it almost always is
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return False


def _webp_complete(start: bytes, size: int) -> bool:
    return len(start) >= 12 and struct.unpack_from("<I", start, 4)[0] + 8 <= size
