"""Opening pictures from their bytes: which container, how large, whether complete, and why not.

The format is told by the content, never by the file's extension. Only the six formats below are tried, so that no other of Pillow's
parsers meets a user's file.
"""

import io
import struct
import zlib
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

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
# A PNG may carry its orientation after the pixels, where Pillow finds it only by decoding them; so look for these names first.
_PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
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


def read_header(data: bytes) -> PictureHeader:
    """Size and format of the picture in `data`, after checking that the file is all there.

    The container's structure is checked, which costs next to nothing; only when that looks incomplete, or has none to check, is
    the first frame decoded. Raises UnreadableImage.
    """
    with open_picture(data) as image:
        name = _format_name(image)
        height, width = _upright_size(image, data)
        if not _looks_complete(data, name):
            decode(image)
    return PictureHeader(height, width, name)


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """The picture in `data`, its pixels not decoded yet, at its first frame.

    Raises UnreadableImage for what is no picture of a known format, and for one of more pixels than Pillow holds to be safe
    (PIL.Image.MAX_IMAGE_PIXELS: a small file may unpack to more memory than the machine has).
    """
    if not data:
        raise UnreadableImage("empty file")
    limit = Image.MAX_IMAGE_PIXELS
    too_large = f"more than {limit} pixels (Pillow's limit against decompression bombs)"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(too_large) from error
    except UnidentifiedImageError as error:
        known = data.startswith(_SIGNATURES)
        raise UnreadableImage(
            "damaged or unsupported picture" if known else "content is not an image"
        ) from error
    except _DECODER_ERRORS as error:
        incomplete = data.startswith(b"RIFF") and not _webp_complete(data)
        raise _unreadable(error, truncated=incomplete) from error
    if limit is not None and image.width * image.height > limit:
        raise UnreadableImage(too_large)
    return image


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


def _upright_size(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    height, width = image.height, image.width
    if image.format == "TIFF":  # Pillow turns these itself, and gives their upright size from the start
        return height, width
    if image.format == "PNG" and not any(name in data for name in _PNG_METADATA):
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
            return _png_complete(data)
        case "JPEG":
            return _jpeg_complete(data)
        case "WEBP":
            return _webp_complete(data)
        case "GIF":
            return data.rstrip(b"\0").endswith(b";")  # the trailer; some writers pad after it
    return False


def _png_complete(data: bytes) -> bool:
    position = 8
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + length  # length, type, data, checksum
    return False


def _jpeg_complete(data: bytes) -> bool:
    # An embedded thumbnail has an end marker of its own, so step over the segments before looking for the picture's.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; in the coded data that follows 0xFF is always stuffed
            return data.find(b"\xff\xd9", position) != -1
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return False


def _webp_complete(data: bytes) -> bool:
    return len(data) >= 12 and struct.unpack_from("<I", data, 4)[0] + 8 <= len(data)
