"""Crops to encode: read from image files, grouped into batches, and distributed over processes. No torch.

Batches are planned for all processes at once and assigned as a unit, so every crop is encoded in the same batch for any number of
processes, and gets the same bits.
"""

import heapq
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, unexpected_as_unreadable
from sdxl_pipeline.data.decoding.pixels import load_crops
from sdxl_pipeline.runtime.stage_runner import UserError

_BATCH_COLUMNS = ["bucket_h", "bucket_w", "key", "latent_key"]


def crop_batches(crops: pd.DataFrame, selected: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return the row numbers of the selected crops (bool, (N,)) in batches of one bucket each, the first row of each latent key.

    Crops are sorted by content, so that file names do not affect the batches, and crops of one image are adjacent and decoded once.
    """
    rows = np.flatnonzero(selected)
    chosen = crops.iloc[rows][_BATCH_COLUMNS].drop_duplicates("latent_key")
    rows = rows[~crops["latent_key"].iloc[rows].duplicated().to_numpy()]
    order = chosen.reset_index(drop=True).sort_values(_BATCH_COLUMNS).index.to_numpy()
    sizes = chosen[["bucket_h", "bucket_w"]].to_numpy()[order]
    new_bucket = np.flatnonzero((sizes[1:] != sizes[:-1]).any(axis=1)) + 1
    return [
        bucket[start : start + batch_size]
        for bucket in np.split(rows[order], new_bucket)
        for start in range(0, len(bucket), batch_size)
    ]


def crop_costs(crops: pd.DataFrame) -> np.ndarray:
    """Return the cost of encoding each crop in pixels: those to decode plus those that the VAE encodes."""
    decoded = crops["original_h"].to_numpy(np.int64) * crops["original_w"].to_numpy(np.int64)
    encoded = crops["bucket_h"].to_numpy(np.int64) * crops["bucket_w"].to_numpy(np.int64)
    costs: np.ndarray = decoded + encoded
    return costs


def batches_of_rank(costs: Sequence[int], rank: int, count: int) -> list[int]:
    """Return the indices of the batches for process `rank` of `count`, in order, given the costs of all batches.

    Batches are assigned in order of decreasing cost, each to the process with the least load (Graham 1969: at most 4/3 of the optimal
    time).
    """
    loads = [(0, process) for process in range(count)]
    assigned = []
    for batch in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + costs[batch], process))
        if process == rank:
            assigned.append(batch)
    return sorted(assigned)


def read_crops(path: Path, key: str | None, crops: Sequence[Crop]) -> list[np.ndarray]:
    """Return crops of the image at `path`: uint8 sRGB, (bucket_h, bucket_w, 3) each.

    The file is read once, so the decoded bytes are the hashed bytes. Raises UnreadableImage when it cannot be read or decoded, or when
    its SHA-256 is not `key` (None: not checked).
    """
    with unexpected_as_unreadable():
        data = path.read_bytes()
    # The latents of an edited image must not be stored under the key of the original.
    if key is not None and sha256(data).hexdigest() != key:
        raise UnreadableImage("changed since the dataset was scanned; materialize the dataset again")
    return load_crops(data, crops)


def require_folder(data_dir: Path) -> None:
    """Raise UserError when the image folder is missing or unreadable: one error rather than one per image."""
    try:
        if data_dir.is_dir():
            next(data_dir.iterdir(), None)
            return
        reason = "does not exist"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise UserError(
        f"the image folder {data_dir} {reason}; it existed when the dataset was scanned. Mount or restore it, or fix "
        "instance_data_dir in multidatabackend.json, and materialize this again"
    )
