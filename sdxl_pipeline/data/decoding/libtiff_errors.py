"""What libtiff reports of a file. On its own it prints that to stderr, without the file's name and once for each bad line.

Pillow turns libtiff's warnings off, and leaves its errors as they are; some of these, such as bad codes in a fax image, do not reach it.
"""

import ctypes
import threading
from contextlib import suppress
from typing import Final

from PIL import Image

_LONGEST: Final = 300  # bytes
_of_thread = threading.local()


def clear() -> None:
    """Forget what was reported in this thread."""
    _of_thread.error = ("", "")


def first_error() -> tuple[str, str]:
    """Return the function of libtiff that reported the first error since `clear` in this thread, and what it reported."""
    found: tuple[str, str] = getattr(_of_thread, "error", ("", ""))
    return found


def _record(function: bytes | None, template: bytes | None, arguments: int | None) -> None:
    if not first_error()[1]:
        text = ctypes.create_string_buffer(_LONGEST)
        _c_library.vsnprintf(text, ctypes.c_size_t(_LONGEST), template, ctypes.c_void_p(arguments))
        _of_thread.error = ((function or b"").decode("latin-1"), text.value.decode("latin-1"))


# A va_list is an address, or is handed over by its address, on every platform but Windows.
_handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_record)
with suppress(OSError, AttributeError, TypeError):  # Windows, or a Pillow without libtiff
    _c_library = ctypes.CDLL(None)
    ctypes.CDLL(Image.core.__file__)["TIFFSetErrorHandler"](_handler)
