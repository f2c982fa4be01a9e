"""Reading one file of a dataset, once: an image's digest and header from the same bytes, a caption file's text.

What is read belongs together: when the file turns out to have changed, or to have been replaced, while it was read, it is read again.
"""

import hashlib
import logging
import os
from typing import BinaryIO, NamedTuple

from sdxl_pipeline.data.captions.caption_rules import TOO_LARGE, UNREADABLE
from sdxl_pipeline.data.captions.text_files import decode_text
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, read_header, unexpected_as_unreadable

LARGE = 32 << 20
"""From this size on, in bytes, an image is read in pieces instead of being held in memory."""
MAX_TEXT = 1 << 20
"""The largest caption file, in bytes."""

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_PIECE = 1 << 20
CHANGED = "changed while it was read"


class ReadFile(NamedTuple):
    """What was found in one file. `size`, `mtime_ns` and `inode` are those it had when it was read."""

    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    key: str = ""
    """Hex SHA-256 of an image's bytes; "" when they could not be read."""
    width: int = 0
    height: int = 0
    format: str = ""
    text: str = ""
    """A caption file's text, with "\\n" at the ends of its lines."""
    text_status: str = ""
    """"ok", "undecodable", "unreadable" or "too large" for a caption file; "" when it was not read as one."""
    unreadable: str = ""
    """Why there is no image to be had."""


def read_image(path: str) -> ReadFile:
    """Return digest, size and format of the image at `path`, or why there are none. Raises nothing, whatever the file is."""
    try:
        with unexpected_as_unreadable():
            return _read_image(path)
    except UnreadableImage as error:
        return ReadFile(unreadable=error.reason)


def _read_image(path: str) -> ReadFile:
    for _ in range(_ATTEMPTS):
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - a Path for each of a million files costs more than opening it
                before = os.fstat(file.fileno())
                read = _read_large(file) if before.st_size >= LARGE else _read_whole(file.read())
            after = os.stat(path)  # noqa: PTH116 - the same; by name, so that a file put in its place is seen too
        except OSError as error:
            return ReadFile(unreadable=_cannot_be_read(error))
        if _identity(before) == _identity(after):
            return read._replace(size=after.st_size, mtime_ns=after.st_mtime_ns, inode=after.st_ino)
    return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, unreadable=CHANGED)


def read_text(path: str) -> ReadFile:
    """Return the text of the caption file at `path`, or why there is none. Raises nothing, whatever the file is."""
    try:
        with unexpected_as_unreadable():
            return _read_text(path)
    except UnreadableImage as error:
        _log.warning("%s: %s", path, error.reason)
        return ReadFile(text_status=UNREADABLE)


def _read_text(path: str) -> ReadFile:
    for _ in range(_ATTEMPTS):
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see above
                before = os.fstat(file.fileno())
                data = file.read(MAX_TEXT + 1)
            after = os.stat(path)  # noqa: PTH116 - see above
        except OSError:
            return ReadFile(text_status=UNREADABLE)
        if _identity(before) == _identity(after):
            text, status = ("", TOO_LARGE) if len(data) > MAX_TEXT else decode_text(data)
            return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, text=text, text_status=status)
    return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, text_status=UNREADABLE)


def _read_whole(data: bytes) -> ReadFile:
    return _with_header(hashlib.sha256(data).hexdigest(), data)


def _read_large(file: BinaryIO) -> ReadFile:
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE))
    while count := file.readinto(piece):  # type: ignore[attr-defined]  # BinaryIO lacks what every binary file has
        digest.update(piece[:count])
    file.seek(0)
    return _with_header(digest.hexdigest(), file)


def _with_header(key: str, data: bytes | BinaryIO) -> ReadFile:
    try:
        header = read_header(data)
    except UnreadableImage as error:
        return ReadFile(key=key, unreadable=error.reason)
    return ReadFile(key=key, width=header.width, height=header.height, format=header.format)


def _identity(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ino


def _cannot_be_read(error: OSError) -> str:
    return (
        "vanished during the scan"
        if isinstance(error, FileNotFoundError)
        else f"cannot be read: {error.strerror}"
    )
