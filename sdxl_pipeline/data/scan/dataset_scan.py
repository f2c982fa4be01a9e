"""Scan of a dataset folder into a table: every file, its image size and captions, and the reason if it is dropped."""

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
from sdxl_pipeline.data.scan.file_listing import FileTypes, classify_files, find_files
from sdxl_pipeline.data.scan.folder_notes import folder_notes
from sdxl_pipeline.data.scan.image_reader import ReadFile, read_image, read_text
from sdxl_pipeline.data.scan.recorded_scan import (
    RACY_NS,
    RecordedScan,
    origin_of,
    read_recorded_scan,
    reuse_recorded,
    write_recorded_scan,
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

_FILES_PER_TASK = 16  # makes the cost of handing tasks to threads negligible
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
    """A dataset's folder that cannot be scanned. The message has the dataset, the key, the folder and a hint."""


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
    """Return one row per file under `folder`, sorted by path, with SCAN_COLUMNS.

    - `path` relative to the folder, with forward slashes; `key` the SHA-256 of the file's bytes ("" if it was not read);
      `size` in bytes; `mtime_ns`.
    - `width`, `height` in pixels after the EXIF orientation, `format` by content; 0 and "" if the file is not an image.
    - `captions`, at least one per kept image, and `caption_status` (see `Captions.status`).
    - `status` "kept" or "dropped", and the `reason` for the latter. `phash` is "": `compute_hashes` fills it in.

    A text file (.txt or .caption) with the name of an image is that image's caption and has no row. Links are followed. Nothing is
    written into the folder. `captions` are those of the dataset's source, by path. `failed` holds (name, reason) of files that the
    source could not fetch; they become dropped rows.

    `recorded` is a file in which the scan stores what it read. The next scan reads only files whose size, modification time or inode
    differ; with `verify` it reads all of them. `on_progress(done, total)` is called after each file that is read. `on_note` gets a
    sentence for each kind of content that the settings leave unused: rows of a caption table that match no image, and the
    `folder_notes`.

    Raises DatasetFolderError if the folder is missing, unreadable or empty; CaptionError if the caption settings refer to
    something that cannot be used.
    """
    started_ns = time.time_ns()
    rules = caption_rules(dataset)
    listing = _list_folder(dataset, folder, bool(failed))
    origin = origin_of(dataset, folder)
    known = None if recorded is None or verify else read_recorded_scan(recorded, origin)
    files = reuse_recorded(listing, known)
    file_types = _file_types_of(dataset, folder, files)
    files = _read_changed(files, file_types, folder, started_ns, rules.text_source == "textfile", on_progress)
    scan = RecordedScan(files, tuple(failed), captions)
    if recorded is not None and (
        known is None or captions is not None or known.failed != scan.failed or not known.files.equals(files)
    ):
        write_recorded_scan(recorded, origin, scan)
    return _frame(scan, file_types, rules, folder, on_note)


def load_recorded_dataset(
    dataset: ImageDataset, folder: Path, recorded: Path, on_note: Callable[[str], None] | None = None
) -> pd.DataFrame | None:
    """Return the frame of the recorded scan under the current caption settings, without listing or reading the folder.

    The result equals that of `scan_dataset` if no file has changed. Return None if there is no usable record, or if it lacks the
    captions that the current settings need.
    """
    scan = read_recorded_scan(recorded, origin_of(dataset, folder), with_captions=True)
    if scan is None:
        return None
    rules = caption_rules(dataset)
    file_types = _file_types_of(dataset, folder, scan.files)
    if rules.text_source == "textfile":
        was_read = scan.files["text_status"].ne("").to_numpy()
        if not all(was_read[position] for position in file_types.sidecars):
            return None
    elif rules.text_source in ("csv", "huggingface") and scan.captions is None:
        return None
    return _frame(scan, file_types, rules, folder, on_note)


def _list_folder(dataset: ImageDataset, folder: Path, may_be_empty: bool) -> pd.DataFrame:
    where = f"dataset {dataset.id!r} in multidatabackend.json: "
    where += (
        "instance_data_dir " if dataset.type == "local" else f"the download folder of type {dataset.type}, "
    )
    where += repr(str(folder))
    if not folder.exists():
        raise DatasetFolderError(
            f"{where} does not exist. Create the folder, or write the path of the folder that has the images."
        )
    if not folder.is_dir():
        raise DatasetFolderError(f"{where} is a file. Write the path of the folder that has the images.")
    try:
        files = find_files(folder)
    except OSError as error:
        raise DatasetFolderError(
            f"{where} cannot be read: {error.strerror}. Give this user read permission."
        ) from error
    if files.empty and not may_be_empty:
        raise DatasetFolderError(
            f"{where} is empty. Add images (PNG, JPEG, WebP, AVIF or another format in docs/datasets.md), or set disabled: true on this dataset."
        )
    return files


def _file_types_of(dataset: ImageDataset, folder: Path, files: pd.DataFrame) -> FileTypes:
    table = table_path(dataset, folder)
    inside = table is not None and table.is_relative_to(folder)
    name = table.relative_to(folder).as_posix() if table is not None and inside else None
    return classify_files(files["path"].tolist(), files["problem"].tolist(), name)


def _read_changed(
    files: pd.DataFrame,
    file_types: FileTypes,
    folder: Path,
    started_ns: int,
    read_texts: bool,
    on_progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """Return `files` with the columns of every unsettled image and caption file read."""
    settled = files["settled"].tolist()
    sidecars = file_types.sidecars if read_texts else frozenset()
    pending = [position for position in file_types.images if not settled[position]]
    pending += sorted(position for position in sidecars if not settled[position])
    if not pending:
        return files
    columns = {name: files[name].tolist() for name in _READ_COLUMNS}
    paths = files["path"].tolist()
    root = os.fspath(folder) + "/"

    def read_batch(positions: Sequence[int]) -> list[ReadFile]:
        return [
            (read_text if position in sidecars else read_image)(root + paths[position])
            for position in positions
        ]

    tasks = [pending[start : start + _FILES_PER_TASK] for start in range(0, len(pending), _FILES_PER_TASK)]
    done = 0
    # Reading and hashing release the GIL.
    with ThreadPoolExecutor(max_workers=_worker_count()) as pool:
        for positions, results in zip(tasks, pool.map(read_batch, tasks), strict=True):
            for position, result in zip(positions, results, strict=True):
                for name in _READ_COLUMNS:
                    columns[name][position] = getattr(result, name)
                failed = result.unreadable or result.text_status == UNREADABLE
                settled[position] = not failed and result.mtime_ns < started_ns - RACY_NS
                done += 1
                if on_progress is not None:
                    on_progress(done, len(pending))
    read_columns = {name: pd.Series(values, dtype=files[name].dtype) for name, values in columns.items()}
    return files.assign(**read_columns, settled=settled)


def _worker_count() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, max(4, available + 2))  # more than cores, since threads wait for files and for the GIL


def _frame(
    scan: RecordedScan,
    file_types: FileTypes,
    rules: CaptionRules,
    folder: Path,
    on_note: Callable[[str], None] | None,
) -> pd.DataFrame:
    """Return the rows of a scan under the current settings."""
    files = scan.files
    paths, reasons = files["path"].tolist(), files["unreadable"].tolist()
    if on_note is not None:
        for note in folder_notes(rules.dataset, paths, file_types):
            on_note(note)
    captions: list[list[str]] = [[]] * len(files)
    statuses = [""] * len(files)
    readable = [position for position in file_types.images if not reasons[position]]
    for position, (texts, status) in zip(
        readable, _caption_texts(scan, file_types, rules, readable, folder, on_note), strict=True
    ):
        image_captions = rules.captions_for(paths[position], texts, status)
        captions[position], statuses[position] = list(image_captions.texts), image_captions.status
        reasons[position] = rules.drop_reason(image_captions)
    for position, reason in file_types.skipped.items():
        reasons[position] = reason
    image_columns = ("path", "key", "size", "mtime_ns", "width", "height", "format")
    columns = {name: files[name] for name in image_columns} | {
        "captions": pd.Series(captions, dtype="object"),
        "caption_status": pd.Series(statuses, dtype="str"),
        "reason": pd.Series(reasons, dtype="str"),
    }
    frame = pd.DataFrame(columns)
    if file_types.sidecars:
        is_listed = np.ones(len(files), dtype=bool)
        is_listed[list(file_types.sidecars)] = False
        frame = frame[is_listed]
    if scan.failed:
        frame = pd.concat([frame, _failed_rows(scan.failed)]).sort_values("path", kind="stable")
    frame = frame.reset_index(drop=True)
    if rules.dataset.max_num_samples is not None:
        frame["reason"] = _sampled_reasons(frame, rules.dataset.max_num_samples)
    frame["status"] = pd.Series(np.where(frame["reason"] == "", KEPT, DROPPED), dtype="str")
    frame["phash"] = pd.Series("", index=frame.index, dtype="str")
    return frame[list(SCAN_COLUMNS)]


def _caption_texts(
    scan: RecordedScan,
    file_types: FileTypes,
    rules: CaptionRules,
    readable: Sequence[int],
    folder: Path,
    on_note: Callable[[str], None] | None,
) -> Iterable[tuple[Sequence[str], str]]:
    """Return (texts, status) that were read for the captions of each readable image."""
    match rules.text_source:
        case "textfile":
            texts, statuses = scan.files["text"].tolist(), scan.files["text_status"].tolist()
            one = rules.dataset.disable_multiline_split
            owned_files = map(file_types.caption_files.get, readable)
            return (
                ((), MISSING) if file is None else (captions_in(texts[file], one), statuses[file])
                for file in owned_files
            )
        case "parquet":
            paths = scan.files["path"].tolist()
            images = [paths[position] for position in readable]
            found = captions_from_table(rules.dataset, folder, images, paths, on_note)
            return map(found.__getitem__, images)
        case "csv" | "huggingface":
            paths, source_captions = scan.files["path"].tolist(), scan.captions or {}
            return (
                (source_captions[path], OK) if path in source_captions else ((), MISSING)
                for path in (paths[i] for i in readable)
            )
    return [((), OK)] * len(readable)


def _sampled_reasons(frame: pd.DataFrame, count: int) -> pd.Series:
    """Return the reasons with all but `count` kept rows dropped, chosen by a hash of the content so that added files move few others."""
    kept = frame[frame["reason"] == ""]
    ranks = [hashlib.sha256(f"sample/{key}".encode()).digest() for key in kept["key"]]
    order = sorted(zip(ranks, kept["path"], kept.index, strict=True))
    return frame["reason"].mask(frame.index.isin([row for *_, row in order[count:]]), NOT_SAMPLED)


def _failed_rows(failed: Sequence[tuple[str, str]]) -> pd.DataFrame:
    rows = pd.DataFrame(failed, columns=["path", "reason"], dtype="str")
    for name in ("key", "format", "caption_status"):
        rows[name] = pd.Series("", index=rows.index, dtype="str")
    for name in ("size", "mtime_ns", "width", "height"):
        rows[name] = 0
    rows["captions"] = [[] for _ in rows.index]
    return rows
