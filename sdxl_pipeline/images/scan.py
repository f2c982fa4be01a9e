"""From a folder to a table: every file found, what it is, and why it was left out if it was."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from sdxl_pipeline.images.captions import captions_of
from sdxl_pipeline.images.decoding import UnreadableImage, read_header
from sdxl_pipeline.images.walk import FoundFile, find_files
from sdxl_pipeline.project.datasets import ImageDataset

KEPT = "kept"
DROPPED = "dropped"

_PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
)
_OTHER_PICTURE_SUFFIXES = frozenset(
    {
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".psd",
        ".svg",
        ".exr",
        ".hdr",
        ".tga",
        ".ico",
        ".ppm",
        ".pgm",
    }
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}
)
_CAPTION_SUFFIX = ".txt"


class DatasetFolderError(Exception):
    """A dataset's folder cannot be scanned at all. The message names the dataset, the key, the folder and the remedy."""


@dataclass(frozen=True)
class _Row:
    path: str
    key: str = ""
    size: int = 0
    mtime_ns: int = 0
    width: int = 0
    height: int = 0
    format: str = ""
    captions: list[str] = field(default_factory=list)
    caption_status: str = ""
    status: str = DROPPED
    reason: str = ""


SCAN_COLUMNS = tuple(_Row.__dataclass_fields__)


def scan_dataset(
    dataset: ImageDataset, on_progress: Callable[[int, int], None] | None = None
) -> pd.DataFrame:
    """One row per file found under the dataset's folder, sorted by path, with SCAN_COLUMNS.

    - `path` relative to the folder, with forward slashes; `key` the SHA-256 of the file's bytes ("" when it was not read);
      `size` in bytes; `mtime_ns`.
    - `width`, `height` in pixels after the EXIF orientation, `format` by content; 0 and "" when there is no picture.
    - `captions`, one or more for each kept picture, and `caption_status` ("ok", "missing", "empty", "undecodable", "unreadable").
    - `status` "kept" or "dropped", and the `reason` for the latter.

    A text file that shares its name with a picture is that picture's caption and no row of its own. Links are followed. Nothing
    is written. `on_progress(done, total)` is called after each picture read. Raises DatasetFolderError when there is no folder,
    when it cannot be listed, or when it is empty.
    """
    files = _list_folder(dataset)
    pictures: list[FoundFile] = []
    texts: list[FoundFile] = []
    rows: list[_Row] = []
    owners: set[str] = set()  # a caption belongs to its picture even when that picture is dropped
    for file in files:
        if reason := _drop_reason(file):
            rows.append(_row(file, reason))
        elif file.suffix == _CAPTION_SUFFIX:
            texts.append(file)
        else:
            pictures.append(file)
        if file.suffix in _PICTURE_SUFFIXES | _OTHER_PICTURE_SUFFIXES:
            owners.add(file.stem_path)
    caption_files = {file.stem_path: file for file in texts if file.stem_path in owners}
    for file in texts:
        if caption_files.get(file.stem_path) is not file:
            rows.append(_row(file, "caption without picture"))
    rows += _read_pictures(dataset, pictures, caption_files, on_progress)
    rows.sort(key=lambda row: row.path)
    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(SCAN_COLUMNS))
    integers = {"size", "mtime_ns", "width", "height"}
    types = {name: "int64" if name in integers else "str" for name in SCAN_COLUMNS if name != "captions"}
    return frame.astype(types)


def _list_folder(dataset: ImageDataset) -> list[FoundFile]:
    folder = dataset.instance_data_dir
    where = f"dataset {dataset.id!r} in multidatabackend.json: instance_data_dir {str(folder)!r}"
    if not folder.exists():
        raise DatasetFolderError(
            f"{where} does not exist. Create the folder, or write the path of the one that has the pictures."
        )
    if not folder.is_dir():
        raise DatasetFolderError(f"{where} is a file. Write the path of the folder that has the pictures.")
    try:
        files = find_files(folder)
    except OSError as error:
        raise DatasetFolderError(
            f"{where} cannot be read: {error.strerror}. Give this user the right to read it."
        ) from error
    if not files:
        raise DatasetFolderError(
            f"{where} is empty. Put pictures into it (PNG, JPEG, WebP, BMP, GIF or TIFF), or set disabled: true on this dataset."
        )
    return files


def _drop_reason(file: FoundFile) -> str:
    """Why a file is left out without reading it."""
    if file.problem:
        return file.problem
    if file.hidden:
        return "hidden file"
    if file.suffix in _OTHER_PICTURE_SUFFIXES:
        return f"picture format {file.suffix} is not supported"
    if file.suffix not in _PICTURE_SUFFIXES and file.suffix != _CAPTION_SUFFIX:
        return "not an image"
    return ""


def _read_pictures(
    dataset: ImageDataset,
    pictures: list[FoundFile],
    caption_files: dict[str, FoundFile],
    on_progress: Callable[[int, int], None] | None,
) -> list[_Row]:
    def read(file: FoundFile) -> _Row:
        caption = caption_files.get(file.stem_path)
        return _read_picture(dataset, file, dataset.instance_data_dir / caption.path if caption else None)

    rows: list[_Row] = []
    # Reading and hashing release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(8, max(2, os.cpu_count() or 2))) as pool:
        for row in pool.map(read, pictures):
            rows.append(row)
            if on_progress is not None:
                on_progress(len(rows), len(pictures))
    return rows


def _read_picture(dataset: ImageDataset, file: FoundFile, caption_file: Path | None) -> _Row:
    try:
        data = (dataset.instance_data_dir / file.path).read_bytes()
    except OSError as error:
        return _row(file, f"cannot be read: {error.strerror}")
    row = replace(_row(file), key=hashlib.sha256(data).hexdigest())
    try:
        header = read_header(data)
    except UnreadableImage as error:
        return replace(row, reason=error.reason)
    captions = captions_of(dataset, file.path, caption_file)
    return replace(
        row,
        width=header.width,
        height=header.height,
        format=header.format,
        captions=list(captions.texts),
        caption_status=captions.status,
        status=DROPPED if captions.drop_reason else KEPT,
        reason=captions.drop_reason,
    )


def _row(file: FoundFile, reason: str = "") -> _Row:
    return _Row(file.path, size=file.size, mtime_ns=file.mtime_ns, reason=reason)
