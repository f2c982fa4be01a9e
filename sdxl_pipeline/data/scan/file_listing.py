"""The files of a data folder, and which of them are images, captions or unread."""

import os
import stat
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

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


LISTING_COLUMNS = {"path": "str", "size": "int64", "mtime_ns": "int64", "inode": "uint64", "problem": "str"}
"""Columns of `find_files` with their dtypes.

`path` is relative to the root, with forward slashes; bytes that are not UTF-8 appear as backslash escapes. `problem` is the reason
why a file cannot be used whatever its content, and then the numbers are 0; it is empty for a regular file.
"""

Folders = list[tuple[Path, str]]
"""Folders to list, each with the prefix of its files' relative paths."""


class _ListingColumns:
    """Growing columns of the listing: lists rather than an object per file, which would be slow for a million files."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes: list[int] = []
        self.mtimes: list[int] = []
        self.inodes: list[int] = []
        self.problems: list[str] = []

    def add_problem(self, path: str, problem: str) -> None:
        self.paths.append(os.fsencode(path).decode("utf-8", "backslashreplace"))
        self.sizes.append(0)
        self.mtimes.append(0)
        self.inodes.append(0)
        self.problems.append(problem)

    def table(self) -> pd.DataFrame:
        order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
        columns = (self.sizes, self.mtimes, self.inodes)
        numbers = {
            name: np.array(column, dtype=LISTING_COLUMNS[name])[order]
            for name, column in zip(("size", "mtime_ns", "inode"), columns, strict=True)
        }
        return pd.DataFrame(
            {
                "path": pd.Series([self.paths[row] for row in order], dtype="str"),
                **numbers,
                "problem": pd.Series([self.problems[row] for row in order], dtype="str"),
            }
        )


def find_files(root: Path) -> pd.DataFrame:
    """Return a row with LISTING_COLUMNS for every file under `root`, at any depth, sorted by path.

    Links to files and folders are followed. A folder reachable by several paths, or by a loop of links, is listed once: under its own
    path if that is below `root`, else under the first link to it. A folder that cannot be listed is one row with its problem, so
    that it is not overlooked. Raises OSError if `root` itself cannot be listed.
    """
    columns = _ListingColumns()
    entered: set[tuple[int, int]] = set()
    pending: deque[tuple[Path, str]] = deque([(root, "")])
    pending_links: deque[tuple[Path, str]] = deque()  # after all real folders, whose paths take precedence
    while pending or pending_links:
        folder, prefix = pending.popleft() if pending else pending_links.popleft()
        try:
            info = folder.stat()
            if (info.st_dev, info.st_ino) in entered:
                continue
            entered.add((info.st_dev, info.st_ino))
            real_folders, linked_folders = _list(folder, prefix, columns)
        except OSError as error:
            if not prefix:
                raise
            columns.add_problem(prefix, f"folder cannot be read: {error.strerror}")
            continue
        pending.extend(real_folders)
        pending_links.extend(linked_folders)
    return columns.table()


def _list(folder: Path, prefix: str, columns: _ListingColumns) -> tuple[Folders, Folders]:
    """Add the files of one folder to `columns`; return its subfolders and its links to folders."""
    real_folders: Folders = []
    linked_folders: Folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            try:
                if entry.is_dir():
                    (linked_folders if entry.is_symlink() else real_folders).append(
                        (Path(entry.path), path + "/")
                    )
                    continue
                info = entry.stat()
                path.encode()
            except UnicodeEncodeError:
                columns.add_problem(path, "file name is not UTF-8")
                continue
            except OSError as error:  # is_dir() raises it for a link to itself
                link = entry.is_symlink()
                columns.add_problem(path, "broken link" if link else f"cannot be read: {error.strerror}")
                continue
            if not stat.S_ISREG(info.st_mode):  # reading a pipe would block
                columns.add_problem(path, "not a regular file")
                continue
            columns.paths.append(path)
            columns.sizes.append(info.st_size)
            columns.mtimes.append(info.st_mtime_ns)
            columns.inodes.append(info.st_ino)
            columns.problems.append("")
    return sorted(real_folders), sorted(linked_folders)
