r"""Digests of a dataset: of its files as they are in the folder, and of the rows of its tables.

Remote sources are not queried: a sensor would list a bucket of a million files every minute, and a lost connection would count as a
change. The scheduled run lists the source itself, downloads new files and reuses everything else.

The SHA-256 is computed over a canonical form: rows sorted by their columns in the given order, strings by their UTF-8 bytes; then for
each column its name and a zero byte, followed for integers (and booleans as 0 and 1) by the values as little-endian 64-bit integers,
for strings by their lengths in bytes as such integers and their concatenated bytes. A row's captions are one string: each caption
with backslash as `\\` and line feed as `\n`, terminated by a line feed.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.buckets.crop_plan import ROW_COLUMNS
from sdxl_pipeline.data.captions.caption_rules import complete_caption_settings
from sdxl_pipeline.data.captions.caption_tables import table_path
from sdxl_pipeline.data.scan.file_listing import find_files
from sdxl_pipeline.files.digest import digest_json

_DATASET_COLUMNS = ("key", "height", "width", "captions")
_PLAN_COLUMNS = tuple(column for column in ROW_COLUMNS if column != "path")


def dataset_digest(scanned: pd.DataFrame) -> str:
    """Return the hex digest of the content, size and captions of each kept image of a scan, independent of row order.

    Names, times and dropped files are excluded: renaming an image or adding an unrelated file makes nothing stale, unless the name
    is the caption.
    """
    return frame_digest(scanned[scanned["status"] == "kept"], _DATASET_COLUMNS)


def rows_digest(rows: pd.DataFrame) -> str:
    """Return the hex digest of a crop plan: content, geometry and split of each crop, independent of row order."""
    return frame_digest(rows, _PLAN_COLUMNS)


def frame_digest(frame: pd.DataFrame, columns: tuple[str, ...]) -> str:
    """Return the hex digest of `columns` (strings, integers or booleans; `captions` lists of strings), independent of row order."""
    table = pa.table({column: _column(frame[column]) for column in columns})
    table = table.take(pc.sort_indices(table, sort_keys=[(column, "ascending") for column in columns]))
    digest = hashlib.sha256()
    for column in columns:
        values = table[column]
        digest.update(column.encode() + b"\0")
        if pa.types.is_large_string(values.type):
            digest.update(_integers(pc.binary_length(values)))
            for chunk in values.chunks:
                digest.update(_string_bytes(chunk))
        else:
            digest.update(_integers(values))
    return digest.hexdigest()


def _column(values: pd.Series) -> pa.Array:
    if values.name != "captions":
        is_text = pd.api.types.is_string_dtype(values)
        return pa.array(values, type=pa.large_string() if is_text else pa.int64())
    # a frame read from Parquet has arrays instead of lists
    lists = pa.array(values, type=pa.list_(pa.large_string()), from_pandas=True)
    escaped = pc.replace_substring(pc.replace_substring(lists.flatten(), "\\", "\\\\"), "\n", "\\n")
    empty, line_feed = (pa.scalar(text, pa.large_string()) for text in ("", "\n"))
    terminated = pa.ListArray.from_arrays(
        lists.offsets, pc.binary_join_element_wise(escaped, empty, line_feed)
    )
    return pc.binary_join(terminated, empty)


def _integers(values: pa.ChunkedArray) -> bytes:
    return values.to_numpy().astype("<i8").tobytes()


def _string_bytes(values: pa.Array) -> memoryview:
    """Return the concatenated bytes of all strings of an array."""
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    return memoryview(data or b"")[int(ends[0]) : int(ends[-1])]


METADATA_ENTRY = "fingerprint"
"""Metadata entry in which assets record the fingerprint of their inputs."""

OVERRIDES_ENTRY = "overridden_settings"
"""Metadata entry in which a LoRA records the settings that its run overrode."""


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of the name, size and modification time of every file below `folder`; "absent" if there is no folder.

    No file is read, so an edit that preserves size and time is not detected.
    """
    if not folder.is_dir():
        return "absent"
    files = find_files(folder)
    return digest_json(
        [
            list(row)
            for row in zip(files["path"], files["size"].tolist(), files["mtime_ns"].tolist(), strict=True)
        ]
    )


def dataset_fingerprint(dataset: ImageDataset) -> str:
    """Return a digest of the local files that a dataset is read from: its folder or list, caption table and filter list.

    The images of a remote dataset, and of one whose files are excluded by `skip_file_discovery`, count as "not watched". No secret
    of the dataset is part of the digest.
    """
    if dataset.skipped_stages & {"metadata", "aspect"}:
        return "not watched"
    images, table_files = "not watched", [dataset.caption_filter_list, dataset.csv_file]
    if dataset.type == "local" and dataset.instance_data_dir is not None:
        images = folder_fingerprint(dataset.instance_data_dir)
        table_files = [dataset.caption_filter_list, table_path(dataset, dataset.instance_data_dir)]
    file_states = [_file_state(path) for path in table_files if isinstance(path, Path)]
    return digest_json([images, file_states]) if file_states else images


def has_remote_datasets(project: Project) -> bool:
    """Return whether the project has remote images that may change. A dataset pinned to one commit never changes."""
    return any(
        dataset.type != "local"
        and not (dataset.type == "huggingface" and re.fullmatch("[0-9a-f]{40}", dataset.revision or ""))
        for dataset in (*project.datasets, *project.mask_datasets)
    )


def folder_states(project: Project) -> dict[str, str]:
    """Return the current `dataset_fingerprint` of each dataset by dataset asset key."""
    return {
        f"{project.name}/{dataset.stage_name('dataset')}": dataset_fingerprint(dataset)
        for dataset in _datasets_with_caption_settings(project)
    }


def project_fingerprint(
    project: Project, folders: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> str:
    """Return the digest of a project's settings and of its datasets' fingerprints.

    `folders` maps dataset asset keys to fingerprints recorded earlier; by default they are computed now. `overrides` are the settings
    that a run replaced, with their values, so that its fingerprint differs from that of the configuration.
    """
    datasets = _datasets_with_caption_settings(project)
    if folders is None:
        folders = folder_states(project)
    settings = [
        project.training.model_dump(mode="json"),
        [dataset.model_dump(mode="json") for dataset in datasets],
        [list(prompt) for prompt in project.prompts],
    ]
    return digest_json([dict(folders), settings, *([dict(overrides)] if overrides else [])])


def _datasets_with_caption_settings(project: Project) -> list[ImageDataset]:
    return [
        complete_caption_settings(dataset, project.text_embeds_of(dataset), project.training.seed)
        for dataset in (*project.datasets, *project.mask_datasets)
    ]


def _file_state(file: Path) -> list[int]:
    try:
        info = file.stat()
    except OSError:
        return []
    return [info.st_size, info.st_mtime_ns]
