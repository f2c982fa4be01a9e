"""Content digests of the frames, for data versions: equal pictures and captions give equal digests on any machine."""

import pandas as pd

from sdxl_pipeline.images.crops import ROW_COLUMNS
from sdxl_pipeline.store.digest import digest_json

_DATASET_COLUMNS = ["path", "key", "width", "height", "format", "captions"]


def dataset_digest(scanned: pd.DataFrame) -> str:
    """Hex digest of what a scanned dataset trains on: its kept pictures with their captions.

    Times, absolute paths and files that were dropped are left out, so a stray file beside the pictures makes nothing stale.
    """
    return _digest(scanned[scanned["status"] == "kept"], _DATASET_COLUMNS)


def rows_digest(rows: pd.DataFrame) -> str:
    """Hex digest of a crop plan: every column of every row."""
    return _digest(rows, list(ROW_COLUMNS))


def _digest(frame: pd.DataFrame, columns: list[str]) -> str:
    ordered = frame.sort_values("path", kind="stable")
    # a frame read back from Parquet holds arrays where it held lists
    values = {
        column: [list(item) for item in ordered[column]] if column == "captions" else ordered[column].tolist()
        for column in columns
    }
    return digest_json(values)
