"""What images and their files are called: after their prompts, and no two alike. No torch."""

import re
import unicodedata
from collections.abc import Callable, Iterable

MAX_CHARACTERS = 80
MAX_BYTES = 160
"""Of a prompt's name in a file's: with size, number and suffix it stays below the 255 bytes that file systems hold."""


def file_stem(name: str) -> str:
    """A name in letters and digits of any language, `_` and `-`, cut to MAX_CHARACTERS."""
    kept = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", name)).strip("_")[:MAX_CHARACTERS]
    return kept.encode()[:MAX_BYTES].decode(errors="ignore") or "image"


def distinct_names(names: Iterable[str], ending: str = "") -> list[str]:
    """The names, with a number where one has been there before, with or without `ending`."""
    return _distinct(names, " ", ending, str)


def distinct_stems(stems: Iterable[str], ending: str = "") -> list[str]:
    """The same of files, which some disks do not tell apart by case."""
    return _distinct(stems, "_", ending, str.casefold)


def _distinct(names: Iterable[str], before_number: str, ending: str, key: Callable[[str], str]) -> list[str]:
    taken: set[str] = set()
    distinct = []
    for wanted in names:
        name, number = wanted, 2
        while taken & (forms := {key(name), key(name + ending)}):
            name, number = f"{wanted}{before_number}{number}", number + 1
        taken |= forms
        distinct.append(name)
    return distinct
