"""Distinct names of images and of their files, made from prompt names. Does not import torch."""

import re
import unicodedata
from collections.abc import Callable, Iterable

MAX_CHARACTERS = 80
MAX_BYTES = 160
"""Limits of a prompt's part of a file name, which with size, number and suffix stays below the 255 bytes that file systems allow."""


def file_stem(name: str) -> str:
    """Return `name` with only letters and digits of any language, `_` and `-`, cut to MAX_CHARACTERS and MAX_BYTES."""
    stem = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", name)).strip("_")[:MAX_CHARACTERS]
    return stem.encode()[:MAX_BYTES].decode(errors="ignore") or "image"


def distinct_names(names: Iterable[str], suffix: str = "") -> list[str]:
    """Return the names, numbered where one would repeat an earlier name, with or without `suffix`."""
    return _distinct(names, " ", suffix, str)


def distinct_stems(stems: Iterable[str], suffix: str = "") -> list[str]:
    """Return the file stems, numbered like `distinct_names` but ignoring case, because some file systems do."""
    return _distinct(stems, "_", suffix, str.casefold)


def _distinct(names: Iterable[str], separator: str, suffix: str, key: Callable[[str], str]) -> list[str]:
    used: set[str] = set()
    distinct = []
    for original in names:
        name, number = original, 2
        while used & (forms := {key(name), key(name + suffix)}):
            name, number = f"{original}{separator}{number}", number + 1
        used |= forms
        distinct.append(name)
    return distinct
