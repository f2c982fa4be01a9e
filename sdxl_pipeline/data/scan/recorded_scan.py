"""Record of a scan's file contents, so that the next scan reads only new and changed files.

The table holds what was read from files, independent of settings: another caption strategy or filter list reads no image again. A
record is reused if path, size, modification time and inode are unchanged, and if the file's last change was old enough when it was
read: a second change within one tick of the file system's clock has the same time (git calls such files racy).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.scan.file_listing import LISTING_COLUMNS
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.files.digest import digest_json

CONTENT_COLUMNS = {
    "key": "str",
    "width": "int64",
    "height": "int64",
    "format": "str",
    "unreadable": "str",
    "text": "str",
    "text_status": "str",
    "settled": "bool",
}
"""What was read from each file: an image's digest and size, a caption file's text, and whether the record may be reused."""

RACY_NS = 2_000_000_000
"""Minimum age of a file's last change for its record to be reused; FAT has a time resolution of two seconds."""

_FORMAT = 1
_METADATA_KEY = b"sdxl_pipeline"
_CAPTIONS = "captions"
_COLUMNS = {**LISTING_COLUMNS, **CONTENT_COLUMNS}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedScan:
    """Recorded files of one folder."""

    files: pd.DataFrame
    """LISTING_COLUMNS and FACT_COLUMNS, sorted by path."""
    failed: tuple[tuple[str, str], ...] = ()
    """(name, reason) of each file that the source could not fetch."""
    captions: Mapping[str, tuple[str, ...]] | None = None
    """Captions of the source by path; None if it has none."""


def origin_of(dataset: ImageDataset, folder: Path) -> str:
    """Return a digest of the origin of a dataset's files and source captions; a record of another origin is not reused."""
    source = dataset.model_dump(mode="json", include=keys_used_by(ImageDataset, "scan"))
    return digest_json([str(folder.absolute()), source])


def read_recorded_scan(path: Path, origin: str, with_captions: bool = False) -> RecordedScan | None:
    """Return the scan recorded at `path` for this `origin`; None if there is none, with a log message if it cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    try:
        with pq.ParquetFile(path) as file:
            entry = json.loads((file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}"))
            if entry.get("format") != _FORMAT or entry.get("origin") != origin:
                _log.info(
                    "%s was recorded by another version or for another folder: every file is read again", path
                )
                return None
            files = file.read(columns=list(_COLUMNS)).to_pandas().astype(_COLUMNS)[list(_COLUMNS)]
            captions = None
            if with_captions and entry["captions"]:
                lists = file.read(columns=[_CAPTIONS])[_CAPTIONS].to_pylist()
                captions = {
                    name: tuple(texts)
                    for name, texts in zip(files["path"], lists, strict=True)
                    if texts is not None
                }
        return RecordedScan(files, tuple((name, reason) for name, reason in entry["failed"]), captions)
    except (OSError, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be used, every file is read again: %s", path, str(error).split("\n")[0])
        return None


def write_recorded_scan(path: Path, origin: str, scan: RecordedScan) -> None:
    """Write a scan to `path` atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(scan.files[list(_COLUMNS)], preserve_index=False)
    if scan.captions is not None:
        lists = [scan.captions.get(name) for name in scan.files["path"]]
        table = table.append_column(_CAPTIONS, pa.array(lists, pa.list_(pa.string())))
    entry = {
        "format": _FORMAT,
        "origin": origin,
        "failed": [list(item) for item in scan.failed],
        "captions": scan.captions is not None,
    }
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(entry).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def reuse_recorded(listing: pd.DataFrame, recorded: RecordedScan | None) -> pd.DataFrame:
    """Return `listing` with CONTENT_COLUMNS: recorded values for unchanged files, empty and not `settled` for the others."""
    defaults = {"width": 0, "height": 0, "settled": False}
    if recorded is None or recorded.files.empty or listing.empty:
        blank = {
            name: pd.Series(defaults.get(name, ""), index=listing.index, dtype=dtype)
            for name, dtype in CONTENT_COLUMNS.items()
        }
        return listing.assign(**blank)
    positions = pd.Index(recorded.files["path"]).get_indexer(pd.Index(listing["path"]))
    before = recorded.files.iloc[positions].reset_index(drop=True)  # position -1 marks a file without record
    unchanged = (positions >= 0) & before["settled"].to_numpy()
    for name in ("size", "mtime_ns", "inode", "problem"):
        unchanged &= (before[name] == listing[name]).to_numpy()
    content = before[list(CONTENT_COLUMNS)]
    if not unchanged.all():
        content = content.copy()
        for name in CONTENT_COLUMNS:
            content.loc[~unchanged, name] = defaults.get(name, "")
    return pd.concat([listing, content], axis=1)
