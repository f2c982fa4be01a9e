"""Capture of libtiff's errors, which it prints to stderr without the file name and once per invalid line.

Pillow disables libtiff's warnings but not its errors, and does not raise for some of them, such as invalid codes in a fax image.
"""

import ctypes
import threading
from contextlib import suppress
from typing import Final

from PIL import Image

_MAX_MESSAGE_BYTES: Final = 300
_thread_local = threading.local()


def clear() -> None:
    """Clear the error of this thread."""
    _thread_local.error = ("", "")


def first_error() -> tuple[str, str]:
    """Return (libtiff function, message) of the first error since `clear` in this thread; empty strings if there is none."""
    error: tuple[str, str] = getattr(_thread_local, "error", ("", ""))
    return error


def _record(function: bytes | None, template: bytes | None, arguments: int | None) -> None:
    if not first_error()[1]:
        text = ctypes.create_string_buffer(_MAX_MESSAGE_BYTES)
        _c_library.vsnprintf(text, ctypes.c_size_t(_MAX_MESSAGE_BYTES), template, ctypes.c_void_p(arguments))
        _thread_local.error = ((function or b"").decode("latin-1"), text.value.decode("latin-1"))


# A va_list is an address, or is passed by its address, on every platform except Windows.
_handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_record)
with suppress(OSError, AttributeError, TypeError):  # Windows, or a Pillow without libtiff
    _c_library = ctypes.CDLL(None)
    ctypes.CDLL(Image.core.__file__)["TIFFSetErrorHandler"](_handler)
