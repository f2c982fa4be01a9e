"""What each file of a folder is by its name: an image, the caption file of one, or something that is left out, and why."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_pipeline.data.decoding.image_formats import IMAGE_SUFFIXES, OTHER_SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
"""Extensions of caption files, the first of which goes before the second; kohya's trainers and captioning tools write the latter."""
SHADOWED = "caption file is not read beside one with the extension"


@dataclass(frozen=True)
class FileTypes:
    """The roles of the files of a listing, by their position in it."""

    images: list[int]
    caption_files: dict[int, int]
    """Caption file of each image that has one."""
    companions: frozenset[int]
    """Caption files that belong to an image, be it one that is left out."""
    left_out: dict[int, str]
    """Why, of every file that is neither an image nor a companion."""


def classify_files(paths: Sequence[str], problems: Sequence[str], table: str | None = None) -> FileTypes:
    """The roles of the files at `paths`, relative and sorted; `problems` says what is wrong with one as a file.

    A caption file has the name of its image, but for the extension, .txt or .caption, whose case does not matter. Where there are
    several, .txt goes before .TXT, and both go before .caption; the others are left out. The case of the name itself does, since A.jpg and a.jpg may be two images. One that differs only in how its
    accents are encoded (Unicode's normal forms) is the image's, unless another one fits exactly. Images that differ only in
    their extension share it. `table` is the path of a caption table, which is left out under that name.
    """
    images: list[int] = []
    stems: dict[int, str] = {}
    texts: dict[str, int] = {}
    left_out: dict[int, str] = {}
    owners: set[str] = set()  # a caption belongs to its image even when that image is left out
    for position, path in enumerate(paths):
        stem, suffix = split_suffix(path)
        is_image = suffix in IMAGE_SUFFIXES
        if is_image or suffix in OTHER_SUFFIXES:
            owners.add(stem)
        if problems[position]:
            left_out[position] = problems[position]
        elif path[0] == "." or "/." in path:
            left_out[position] = "hidden file"
        elif is_image:
            images.append(position)
            stems[position] = stem
        elif suffix in CAPTION_SUFFIXES:
            read, other = sorted((position, texts.get(stem, position)), key=lambda at: _precedence(paths[at]))
            texts[stem] = read
            if other != read:
                left_out[other] = f"{SHADOWED} {_suffix(paths[read])}"
        elif path == table:
            left_out[position] = "caption table"
        elif suffix in OTHER_SUFFIXES:
            left_out[position] = f"image format {suffix} is not supported"
        else:
            left_out[position] = "not an image"
    accented = {_composed(stem): position for stem, position in texts.items() if not stem.isascii()}

    def caption_of(stem: str) -> int | None:
        found = texts.get(stem)
        return accented.get(_composed(stem)) if found is None and accented and not stem.isascii() else found

    companions = frozenset(found for stem in owners if (found := caption_of(stem)) is not None)
    orphans = {stem: position for stem, position in texts.items() if position not in companions}
    if orphans:
        folded = {stem.casefold() for stem in owners}
        for stem, position in orphans.items():
            hint = "; an image's name differs in case only" if stem.casefold() in folded else ""
            left_out[position] = "caption without image" + hint
    caption_files = {
        position: found for position in images if (found := caption_of(stems[position])) is not None
    }
    return FileTypes(images, caption_files, companions, left_out)


def split_suffix(path: str) -> tuple[str, str]:
    """The path without its extension, and the extension in lower case with its dot; as os.path.splitext, in half its time."""
    dot = path.rfind(".")
    if dot <= path.rfind("/") + 1:  # none, or one that only hides the file
        return path, ""
    return path[:dot], path[dot:].lower()


def _precedence(path: str) -> tuple[int, bool]:
    suffix = _suffix(path)
    return CAPTION_SUFFIXES.index(suffix.lower()), suffix != suffix.lower()


def _suffix(path: str) -> str:
    """Return the extension as it is written."""
    return path[path.rfind(".") :]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
