"""What a scan found in files, recorded: the next one reads again only what is not as it was.

The table holds what files say, and nothing of what settings make of it: another caption strategy or filter list reads no image
again. A file is trusted when its path, size, modification time and inode are those recorded, and when it had been left alone for a
while when it was read: a change within one tick of the file system's clock cannot be told by its time (what git calls racy).
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

FACT_COLUMNS = {
    "key": "str",
    "width": "int64",
    "height": "int64",
    "format": "str",
    "unreadable": "str",
    "text": "str",
    "text_status": "str",
    "settled": "bool",
}
"""What was read of each file: an image's digest and size, a caption file's text, and whether to trust it next time."""

RACY_NS = 2_000_000_000
"""A file whose last change lies less than this before the scan is read again by the next one; FAT keeps times to two seconds."""

_FORMAT = 1
_ENTRY = b"sdxl_pipeline"
_CAPTIONS = "captions"
_COLUMNS = {**LISTING_COLUMNS, **FACT_COLUMNS}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedScan:
    """The files of one folder as a scan left them."""

    files: pd.DataFrame
    """LISTING_COLUMNS and FACT_COLUMNS, sorted by path."""
    failed: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what the source could not fetch."""
    captions: Mapping[str, tuple[str, ...]] | None = None
    """What the source says of captions, by path; None when it says nothing."""


def origin_of(dataset: ImageDataset, folder: Path) -> str:
    """Digest of where a dataset's files and its source's captions come from: a table of another origin says nothing of this one."""
    source = dataset.model_dump(mode="json", include=keys_used_by(ImageDataset, "scan"))
    return digest_json([str(folder.absolute()), source])


def read_recorded(path: Path, origin: str, with_captions: bool = False) -> RecordedScan | None:
    """The table at `path`, if it was recorded for this `origin`; one that cannot be used is told in the log, and gives None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return None
    try:
        with pq.ParquetFile(path) as file:
            entry = json.loads((file.schema_arrow.metadata or {}).get(_ENTRY, b"{}"))
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


def write_recorded(path: Path, origin: str, scan: RecordedScan) -> None:
    """Record a scan at `path`, atomically."""
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
    table = table.replace_schema_metadata({_ENTRY: json.dumps(entry).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def recall(listing: pd.DataFrame, recorded: RecordedScan | None) -> pd.DataFrame:
    """`listing` with FACT_COLUMNS: what is recorded of the files that are as they were; of the others nothing, and not `settled`."""
    unknown = {"width": 0, "height": 0, "settled": False}
    if recorded is None or recorded.files.empty or listing.empty:
        blank = {
            name: pd.Series(unknown.get(name, ""), index=listing.index, dtype=dtype)
            for name, dtype in FACT_COLUMNS.items()
        }
        return listing.assign(**blank)
    at = pd.Index(recorded.files["path"]).get_indexer(pd.Index(listing["path"]))
    before = recorded.files.iloc[at].reset_index(drop=True)  # row -1 stands in for what is not recorded
    same = (at >= 0) & before["settled"].to_numpy()
    for name in ("size", "mtime_ns", "inode", "problem"):
        same &= (before[name] == listing[name]).to_numpy()
    facts = before[list(FACT_COLUMNS)]
    if not same.all():
        facts = facts.copy()
        for name in FACT_COLUMNS:
            facts.loc[~same, name] = unknown.get(name, "")
    return pd.concat([listing, facts], axis=1)
