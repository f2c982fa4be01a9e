"""Classification of a folder's files by name: images, their caption files, and skipped files with the reason."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_pipeline.data.decoding.image_formats import IMAGE_SUFFIXES, OTHER_SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
"""Extensions of caption files in order of precedence; kohya's trainers and captioning tools write .caption."""
SHADOWED = "caption file is not read beside one with the extension"


@dataclass(frozen=True)
class FileTypes:
    """Types of the files of a listing, by their position in it."""

    images: list[int]
    caption_files: dict[int, int]
    """Position of the caption file by position of its image."""
    sidecars: frozenset[int]
    """Caption files that belong to an image, including a skipped one."""
    skipped: dict[int, str]
    """Reason for every file that is neither an image nor a sidecar."""


def classify_files(paths: Sequence[str], problems: Sequence[str], table: str | None = None) -> FileTypes:
    """Classify the files at `paths`, which are relative and sorted; `problems` are those of `find_files`.

    A caption file has the stem of its image and the extension .txt or .caption in any case. Of several, .txt takes precedence over
    .TXT, and both over .caption; the others are skipped. The case of the stem matters, since A.jpg and a.jpg may be two images. A
    stem that differs only in the Unicode normal form of its accents matches unless another one matches exactly. Images that differ
    only in their extension share a caption file. `table` is the path of a caption table, which is skipped with that reason.
    """
    images: list[int] = []
    stems: dict[int, str] = {}
    texts: dict[str, int] = {}
    skipped: dict[int, str] = {}
    image_stems: set[str] = set()  # including skipped images, whose captions are sidecars too
    for position, path in enumerate(paths):
        stem, suffix = split_suffix(path)
        is_image = suffix in IMAGE_SUFFIXES
        if is_image or suffix in OTHER_SUFFIXES:
            image_stems.add(stem)
        if problems[position]:
            skipped[position] = problems[position]
        elif path[0] == "." or "/." in path:
            skipped[position] = "hidden file"
        elif is_image:
            images.append(position)
            stems[position] = stem
        elif suffix in CAPTION_SUFFIXES:
            chosen, other = sorted(
                (position, texts.get(stem, position)), key=lambda at: _precedence(paths[at])
            )
            texts[stem] = chosen
            if other != chosen:
                skipped[other] = f"{SHADOWED} {_suffix(paths[chosen])}"
        elif path == table:
            skipped[position] = "caption table"
        elif suffix in OTHER_SUFFIXES:
            skipped[position] = f"image format {suffix} is not supported"
        else:
            skipped[position] = "not an image"
    accented = {_composed(stem): position for stem, position in texts.items() if not stem.isascii()}

    def caption_of(stem: str) -> int | None:
        found = texts.get(stem)
        return accented.get(_composed(stem)) if found is None and accented and not stem.isascii() else found

    sidecars = frozenset(found for stem in image_stems if (found := caption_of(stem)) is not None)
    unmatched = {stem: position for stem, position in texts.items() if position not in sidecars}
    if unmatched:
        folded = {stem.casefold() for stem in image_stems}
        for stem, position in unmatched.items():
            hint = "; an image's name differs in case only" if stem.casefold() in folded else ""
            skipped[position] = "caption without image" + hint
    caption_files = {
        position: found for position in images if (found := caption_of(stems[position])) is not None
    }
    return FileTypes(images, caption_files, sidecars, skipped)


def split_suffix(path: str) -> tuple[str, str]:
    """Return the path without its extension, and the extension in lower case with its dot; twice as fast as os.path.splitext."""
    dot = path.rfind(".")
    if dot <= path.rfind("/") + 1:  # no dot, or only that of a hidden file
        return path, ""
    return path[:dot], path[dot:].lower()


def _precedence(path: str) -> tuple[int, bool]:
    suffix = _suffix(path)
    return CAPTION_SUFFIXES.index(suffix.lower()), suffix != suffix.lower()


def _suffix(path: str) -> str:
    """Return the extension without changing its case."""
    return path[path.rfind(".") :]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
