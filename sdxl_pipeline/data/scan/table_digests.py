r"""Content digests of frames for data versions: equal images and captions give equal digests, independent of file names.

The SHA-256 is computed over a canonical form: rows sorted by their columns in the given order, strings by their UTF-8 bytes; then for
each column its name and a zero byte, followed for integers (and booleans as 0 and 1) by the values as little-endian 64-bit integers,
for strings by their lengths in bytes as such integers and their concatenated bytes. A row's captions are one string: each caption
with backslash as `\\` and line feed as `\n`, terminated by a line feed.
"""

import hashlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_pipeline.data.buckets.crop_plan import ROW_COLUMNS

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
