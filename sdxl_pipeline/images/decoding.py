"""Opening pictures from their bytes: which container, how large, whether complete, and why not.

The format is told by the content, never by the file's extension. Only the six formats below are tried, so that no other of Pillow's
parsers meets a user's file.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import (  # the plugins register themselves
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 178_956_970
"""The largest picture that is decoded, to 512 MiB of RGB: Pillow's own limit too. A small file may unpack to more memory than the
machine has; cameras of 150 megapixels stay below."""

_TOO_LARGE = (
    f"more than {MAX_PIXELS // 10**6} million pixels, too large to decode safely (a decompression bomb?)"
)

_SIGNATURE_BYTES = 16
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What Pillow's parsers raise on damaged input, depending on where the damage lies.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
# What its plugins raise for a file of another format, and Image.open goes on to the next one after.
_ANOTHER_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
# A PNG may carry its orientation after the pixels, where Pillow finds it only by decoding them; so look for these chunks first.
_PNG_EXIF = b"eXIf"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")
# How to turn a picture upright, by its EXIF orientation (CIPA DC-008, tag 0x0112); 5 to 8 swap width and height.
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
    """A file that gives no picture. `reason` is a short name that files of the same kind share."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class PictureHeader:
    """What is known of a picture without decoding it. Sizes in pixels, after the EXIF orientation."""

    height: int
    width: int
    format: str


def read_header(data: bytes | BinaryIO) -> PictureHeader:
    """Size and format of the picture in `data`, after checking that the file is all there.

    The container's structure is checked, which costs next to nothing; only when that looks incomplete, or has none to check, is
    the first frame decoded. That is also done when `data` is an open file, which is for those too large to hold in memory.
    Raises UnreadableImage.
    """
    with open_picture(data) as image:
        name = _format_name(image)
        if not isinstance(data, bytes):
            decode(image)
        height, width = _upright_size(image, data)
        if isinstance(data, bytes) and not _looks_complete(data, name):
            decode(image)
    return PictureHeader(height, width, name)


def open_picture(data: bytes | BinaryIO) -> ImageFile.ImageFile:
    """The picture in `data` (bytes or an open file), its pixels not decoded yet, at its first frame.

    Raises UnreadableImage for what is no picture of a known format, and for one of more than MAX_PIXELS.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    start = file.read(_SIGNATURE_BYTES)
    if not start:
        raise UnreadableImage("empty file")
    try:
        image = _identify(file, start)
    except Image.DecompressionBombError as error:
        raise UnreadableImage(_TOO_LARGE) from error
    except _DECODER_ERRORS as error:
        incomplete = start.startswith(b"RIFF") and not _webp_complete(start, file.seek(0, io.SEEK_END))
        raise _unreadable(error, truncated=incomplete) from error
    if image is None:
        known = start.startswith(_SIGNATURES)
        raise UnreadableImage("damaged or unsupported picture" if known else "content is not an image")
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} pixels are {_TOO_LARGE}")
    return image


def _identify(file: BinaryIO, start: bytes) -> ImageFile.ImageFile | None:
    """The picture as the first of FORMATS that takes it opens it.

    Pillow's plugins are asked one by one rather than through Image.open, which warns of each picture above half of MAX_PIXELS and
    whose limit any other code of this process may move.
    """
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(start)
        # a text says that this build of Pillow lacks the decoder
        if not accepted or isinstance(accepted, str):
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except _ANOTHER_FORMAT:
            continue
    return None


def decode(image: ImageFile.ImageFile) -> None:
    """Decode the pixels of the current frame. Raises UnreadableImage naming a truncated or damaged file."""
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise _unreadable(error) from error


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture as it is meant to be seen: turned and mirrored by its EXIF orientation."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _unreadable(error: Exception, truncated: bool = False) -> UnreadableImage:
    return UnreadableImage(
        "truncated" if truncated or "truncated" in str(error).lower() else "damaged picture"
    )


def _format_name(image: ImageFile.ImageFile) -> str:
    # a phone's JPEG with a second picture behind the first is opened as MPO
    return "JPEG" if image.format == "MPO" else str(image.format)


def _upright_size(image: ImageFile.ImageFile, data: bytes | BinaryIO) -> tuple[int, int]:
    height, width = image.height, image.width
    if image.format == "TIFF":  # Pillow turns these itself, and gives their upright size from the start
        return height, width
    if image.format == "PNG" and isinstance(data, bytes) and not _png_may_be_turned(data):
        return height, width
    return (width, height) if _orientation(image) >= 5 else (height, width)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # broken metadata says nothing about the pixels, which may be sound
        return 1
    return orientation if orientation in _TURNS else 1


def _looks_complete(data: bytes, format_name: str) -> bool:
    match format_name:
        case "PNG":
            return any(kind == b"IEND" for kind, _ in _png_chunks(data))
        case "JPEG":
            return _jpeg_complete(data)
        case "WEBP":
            return _webp_complete(data, len(data))
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")  # the trailer; some writers pad after it
    return False


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
    # An embedded thumbnail has an end marker of its own, so step over the segments before looking for the picture's.
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
