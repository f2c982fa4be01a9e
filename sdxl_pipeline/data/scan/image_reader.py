"""Reader of a single dataset file: digest and header of an image from the same bytes, or the text of a caption file.

A file that is changed or replaced while it is read is read again, so that the results belong to one version of it.
"""

import hashlib
import logging
import os
from typing import BinaryIO, NamedTuple

from sdxl_pipeline.data.captions.caption_rules import TOO_LARGE, UNREADABLE
from sdxl_pipeline.data.captions.text_files import decode_text
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, read_header, unexpected_as_unreadable

LARGE_FILE_BYTES = 32 << 20
"""Minimum size of an image that is read in chunks instead of being held in memory."""
MAX_TEXT_BYTES = 1 << 20
"""Maximum size of a caption file."""

_log = logging.getLogger(__name__)
_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 20
CHANGED = "changed while it was read"


class ReadFile(NamedTuple):
    """Content of one file; `size`, `mtime_ns` and `inode` are those at the time it was read."""

    size: int = 0
    mtime_ns: int = 0
    inode: int = 0
    key: str = ""
    """Hex SHA-256 of an image's bytes; "" if they could not be read."""
    width: int = 0
    height: int = 0
    format: str = ""
    text: str = ""
    """Text of a caption file, with "\\n" line endings."""
    text_status: str = ""
    """"ok", "undecodable", "unreadable" or "too large" for a caption file; "" if it was not read as one."""
    unreadable: str = ""
    """Reason why the image cannot be used."""


def read_image(path: str) -> ReadFile:
    """Return digest, size and format of the image at `path`, or the reason in `unreadable`. Does not raise for any file."""
    try:
        with unexpected_as_unreadable():
            return _read_image(path)
    except UnreadableImage as error:
        return ReadFile(unreadable=error.reason)


def _read_image(path: str) -> ReadFile:
    for _ in range(_ATTEMPTS):
        try:
            with open(path, "rb") as file:  # noqa: PTH123 - creating a Path costs more than opening the file
                before = os.fstat(file.fileno())
                read = _read_large(file) if before.st_size >= LARGE_FILE_BYTES else _read_small(file.read())
            after = os.stat(path)  # noqa: PTH116 - see above; by path, to detect a replaced file too
        except OSError as error:
            return ReadFile(unreadable=_read_error(error))
        if _file_identity(before) == _file_identity(after):
            return read._replace(size=after.st_size, mtime_ns=after.st_mtime_ns, inode=after.st_ino)
    return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, unreadable=CHANGED)


def read_text(path: str) -> ReadFile:
    """Return the text of the caption file at `path`, or the reason in `text_status`. Does not raise for any file."""
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
                data = file.read(MAX_TEXT_BYTES + 1)
            after = os.stat(path)  # noqa: PTH116 - see above
        except OSError:
            return ReadFile(text_status=UNREADABLE)
        if _file_identity(before) == _file_identity(after):
            text, status = ("", TOO_LARGE) if len(data) > MAX_TEXT_BYTES else decode_text(data)
            return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, text=text, text_status=status)
    return ReadFile(after.st_size, after.st_mtime_ns, after.st_ino, text_status=UNREADABLE)


def _read_small(data: bytes) -> ReadFile:
    return _with_header(hashlib.sha256(data).hexdigest(), data)


def _read_large(file: BinaryIO) -> ReadFile:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(chunk):  # type: ignore[attr-defined]  # BinaryIO lacks readinto
        digest.update(chunk[:count])
    file.seek(0)
    return _with_header(digest.hexdigest(), file)


def _with_header(key: str, data: bytes | BinaryIO) -> ReadFile:
    try:
        header = read_header(data)
    except UnreadableImage as error:
        return ReadFile(key=key, unreadable=error.reason)
    return ReadFile(key=key, width=header.width, height=header.height, format=header.format)


def _file_identity(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ino


def _read_error(error: OSError) -> str:
    return (
        "vanished during the scan"
        if isinstance(error, FileNotFoundError)
        else f"cannot be read: {error.strerror}"
    )
