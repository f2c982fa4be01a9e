"""From a folder to a table: every file found, what it is, and why it was left out if it was."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.caption_rules import OK, UNREADABLE, CaptionRules, caption_rules, captions_in
from sdxl_pipeline.data.captions.caption_tables import MISSING, captions_from_table, table_path
from sdxl_pipeline.data.scan.file_listing import find_files
from sdxl_pipeline.data.scan.file_types import FileTypes, classify_files
from sdxl_pipeline.data.scan.folder_notes import folder_notes
from sdxl_pipeline.data.scan.image_reader import ReadFile, read_image, read_text
from sdxl_pipeline.data.scan.recorded_scan import (
    RACY_NS,
    RecordedScan,
    origin_of,
    read_recorded,
    recall,
    write_recorded,
)

KEPT = "kept"
DROPPED = "dropped"
NOT_SAMPLED = "left out by max_num_samples"

SCAN_COLUMNS = (
    "path",
    "key",
    "size",
    "mtime_ns",
    "width",
    "height",
    "format",
    "captions",
    "caption_status",
    "status",
    "reason",
    "phash",
)

_FILES_PER_TASK = 16  # so that handing tasks to threads costs nothing beside reading
_READ_COLUMNS = (
    "size",
    "mtime_ns",
    "inode",
    "key",
    "width",
    "height",
    "format",
    "unreadable",
    "text",
    "text_status",
)


class DatasetFolderError(Exception):
    """A dataset's folder cannot be scanned at all. The message names the dataset, the key, the folder and the remedy."""


def scan_dataset(
    dataset: ImageDataset,
    folder: Path,
    *,
    captions: Mapping[str, tuple[str, ...]] | None = None,
    failed: Sequence[tuple[str, str]] = (),
    recorded: Path | None = None,
    verify: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """One row per file found under `folder`, sorted by path, with SCAN_COLUMNS.

    - `path` relative to the folder, with forward slashes; `key` the SHA-256 of the file's bytes ("" when it was not read);
      `size` in bytes; `mtime_ns`.
    - `width`, `height` in pixels after the EXIF orientation, `format` by content; 0 and "" when there is no image.
    - `captions`, one or more for each kept image, and `caption_status` (see `Captions.status`).
    - `status` "kept" or "dropped", and the `reason` for the latter. `phash` "": nobody has looked at the pixels.

    A text file (.txt or .caption) that shares its name with an image is that image's caption and no row of its own. Links are followed. Nothing
    is written into the folder. `captions` are those that the dataset's source gives, by path; `failed`, names and reasons of what it
    could not fetch, become dropped rows.

    `recorded` is a file in which the scan leaves what it read. The next scan reads again only files that are new or changed, by
    size, modification time and inode; with `verify` all of them. `on_progress(done, total)` is called after each file read, of
    those to be read. `on_note` gets a sentence on each kind of content that the settings leave unused: rows of a caption table that
    match no image, and what `folder_notes` finds.

    Raises DatasetFolderError when there is no folder, when it cannot be listed, or when it is empty; CaptionError when the caption
    settings name something that cannot be used.
    """
    began_ns = time.time_ns()
    rules = caption_rules(dataset)
    listing = _list_folder(dataset, folder, bool(failed))
    origin = origin_of(dataset, folder)
    known = None if recorded is None or verify else read_recorded(recorded, origin)
    files = recall(listing, known)
    roles = _roles_of(dataset, folder, files)
    files = _read_changed(files, roles, folder, began_ns, rules.reads == "textfile", on_progress)
    scan = RecordedScan(files, tuple(failed), captions)
    if recorded is not None and (
        known is None or captions is not None or known.failed != scan.failed or not known.files.equals(files)
    ):
        write_recorded(recorded, origin, scan)
    return _frame(scan, roles, rules, folder, on_note)


def recall_dataset(
    dataset: ImageDataset, folder: Path, recorded: Path, on_note: Callable[[str], None] | None = None
) -> pd.DataFrame | None:
    """What `scan_dataset` would give if nothing had changed since it recorded that scan: neither folder nor files are looked at.

    The caption settings are those of today. None when there is no such record, or when it lacks the captions, which were never read.
    """
    scan = read_recorded(recorded, origin_of(dataset, folder), with_captions=True)
    if scan is None:
        return None
    rules = caption_rules(dataset)
    roles = _roles_of(dataset, folder, scan.files)
    if rules.reads == "textfile":
        read = scan.files["text_status"].ne("").to_numpy()
        if not all(read[position] for position in roles.companions):
            return None
    elif rules.reads in ("csv", "huggingface") and scan.captions is None:
        return None
    return _frame(scan, roles, rules, folder, on_note)


def _list_folder(dataset: ImageDataset, folder: Path, may_be_empty: bool) -> pd.DataFrame:
    where = f"dataset {dataset.id!r} in multidatabackend.json: "
    where += (
        "instance_data_dir " if dataset.type == "local" else f"the download folder of type {dataset.type}, "
    )
    where += repr(str(folder))
    if not folder.exists():
        raise DatasetFolderError(
            f"{where} does not exist. Create the folder, or write the path of the one that has the images."
        )
    if not folder.is_dir():
        raise DatasetFolderError(f"{where} is a file. Write the path of the folder that has the images.")
    try:
        files = find_files(folder)
    except OSError as error:
        raise DatasetFolderError(
            f"{where} cannot be read: {error.strerror}. Give this user the right to read it."
        ) from error
    if files.empty and not may_be_empty:
        raise DatasetFolderError(
            f"{where} is empty. Put images into it (PNG, JPEG, WebP, AVIF or others of docs/datasets.md), or set disabled: true on this dataset."
        )
    return files


def _roles_of(dataset: ImageDataset, folder: Path, files: pd.DataFrame) -> FileTypes:
    table = table_path(dataset, folder)
    inside = table is not None and table.is_relative_to(folder)
    name = table.relative_to(folder).as_posix() if table is not None and inside else None
    return classify_files(files["path"].tolist(), files["problem"].tolist(), name)


def _read_changed(
    files: pd.DataFrame,
    roles: FileTypes,
    folder: Path,
    began_ns: int,
    read_texts: bool,
    on_progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """`files` with everything read that is not settled."""
    settled = files["settled"].tolist()
    companions = roles.companions if read_texts else frozenset()
    pending = [position for position in roles.images if not settled[position]]
    pending += sorted(position for position in companions if not settled[position])
    if not pending:
        return files
    columns = {name: files[name].tolist() for name in _READ_COLUMNS}
    paths = files["path"].tolist()
    root = os.fspath(folder) + "/"

    def read(positions: Sequence[int]) -> list[ReadFile]:
        return [
            (read_text if position in companions else read_image)(root + paths[position])
            for position in positions
        ]

    tasks = [pending[start : start + _FILES_PER_TASK] for start in range(0, len(pending), _FILES_PER_TASK)]
    done = 0
    # Reading and hashing release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for positions, results in zip(tasks, pool.map(read, tasks), strict=True):
            for position, result in zip(positions, results, strict=True):
                for name in _READ_COLUMNS:
                    columns[name][position] = getattr(result, name)
                failed = result.unreadable or result.text_status == UNREADABLE
                settled[position] = not failed and result.mtime_ns < began_ns - RACY_NS
                done += 1
                if on_progress is not None:
                    on_progress(done, len(pending))
    read_columns = {name: pd.Series(values, dtype=files[name].dtype) for name, values in columns.items()}
    return files.assign(**read_columns, settled=settled)


def _threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(
        32, max(4, available + 2)
    )  # more than cores: while one waits for its file, or for the interpreter


def _frame(
    scan: RecordedScan,
    roles: FileTypes,
    rules: CaptionRules,
    folder: Path,
    on_note: Callable[[str], None] | None,
) -> pd.DataFrame:
    """The rows of a scan, as today's settings have them."""
    files = scan.files
    paths, reasons = files["path"].tolist(), files["unreadable"].tolist()
    if on_note is not None:
        for note in folder_notes(rules.dataset, paths, roles):
            on_note(note)
    captions: list[list[str]] = [[]] * len(files)
    statuses = [""] * len(files)
    readable = [position for position in roles.images if not reasons[position]]
    for position, (texts, status) in zip(
        readable, _texts(scan, roles, rules, readable, folder, on_note), strict=True
    ):
        made = rules.captions_of(paths[position], texts, status)
        captions[position], statuses[position] = list(made.texts), made.status
        reasons[position] = rules.drop_reason(made)
    for position, reason in roles.left_out.items():
        reasons[position] = reason
    found = ("path", "key", "size", "mtime_ns", "width", "height", "format")
    columns = {name: files[name] for name in found} | {
        "captions": pd.Series(captions, dtype="object"),
        "caption_status": pd.Series(statuses, dtype="str"),
        "reason": pd.Series(reasons, dtype="str"),
    }
    frame = pd.DataFrame(columns)
    if roles.companions:
        is_row = np.ones(len(files), dtype=bool)
        is_row[list(roles.companions)] = False
        frame = frame[is_row]
    if scan.failed:
        frame = pd.concat([frame, _failed_rows(scan.failed)]).sort_values("path", kind="stable")
    frame = frame.reset_index(drop=True)
    if rules.dataset.max_num_samples is not None:
        frame["reason"] = _sampled_reasons(frame, rules.dataset.max_num_samples)
    frame["status"] = pd.Series(np.where(frame["reason"] == "", KEPT, DROPPED), dtype="str")
    frame["phash"] = pd.Series("", index=frame.index, dtype="str")
    return frame[list(SCAN_COLUMNS)]


def _texts(
    scan: RecordedScan,
    roles: FileTypes,
    rules: CaptionRules,
    readable: Sequence[int],
    folder: Path,
    on_note: Callable[[str], None] | None,
) -> Iterable[tuple[Sequence[str], str]]:
    """What was read for the captions of each of the readable images, and how that went."""
    match rules.reads:
        case "textfile":
            texts, statuses = scan.files["text"].tolist(), scan.files["text_status"].tolist()
            one = rules.dataset.disable_multiline_split
            owned = map(roles.caption_files.get, readable)
            return (
                ((), MISSING) if file is None else (captions_in(texts[file], one), statuses[file])
                for file in owned
            )
        case "parquet":
            paths = scan.files["path"].tolist()
            images = [paths[position] for position in readable]
            found = captions_from_table(rules.dataset, folder, images, paths, on_note)
            return map(found.__getitem__, images)
        case "csv" | "huggingface":
            paths, given = scan.files["path"].tolist(), scan.captions or {}
            return (
                (given[path], OK) if path in given else ((), MISSING) for path in (paths[i] for i in readable)
            )
    return [((), OK)] * len(readable)


def _sampled_reasons(frame: pd.DataFrame, count: int) -> pd.Series:
    """Reasons by which only `count` rows are kept: a matter of each one's content, so that others come and go without changing sides."""
    kept = frame[frame["reason"] == ""]
    drawn = [hashlib.sha256(f"sample/{key}".encode()).digest() for key in kept["key"]]
    order = sorted(zip(drawn, kept["path"], kept.index, strict=True))
    return frame["reason"].mask(frame.index.isin([row for *_, row in order[count:]]), NOT_SAMPLED)


def _failed_rows(failed: Sequence[tuple[str, str]]) -> pd.DataFrame:
    rows = pd.DataFrame(failed, columns=["path", "reason"], dtype="str")
    for name in ("key", "format", "caption_status"):
        rows[name] = pd.Series("", index=rows.index, dtype="str")
    for name in ("size", "mtime_ns", "width", "height"):
        rows[name] = 0
    rows["captions"] = [[] for _ in rows.index]
    return rows
