"""What is encoded together, and by which process. No torch.

Batches are planned for all processes at once, and whole ones are dealt out: so every crop is encoded beside the same others whatever
the number of processes, and gets the same bits.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import pandas as pd

_BATCH_COLUMNS = ["bucket_h", "bucket_w", "key", "latent_key"]


def crop_batches(crops: pd.DataFrame, wanted: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Row numbers of the wanted crops (bool, (N,)) in batches of one bucket each; of several rows with one latent key only the first.

    Crops are sorted by content, so files' names decide nothing, and those of one image stand together, to be decoded once.
    """
    rows = np.flatnonzero(wanted)
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
    """What encoding each crop costs, in pixels: those that are decoded, and those that the VAE sees."""
    decoded = crops["original_h"].to_numpy(np.int64) * crops["original_w"].to_numpy(np.int64)
    encoded = crops["bucket_h"].to_numpy(np.int64) * crops["bucket_w"].to_numpy(np.int64)
    costs: np.ndarray = decoded + encoded
    return costs


def own_share(costs: Sequence[int], rank: int, count: int) -> list[int]:
    """The numbers of the batches that one of `count` processes takes, in order, of batches with these costs.

    The dearest batch goes first, each to the process with the least so far (Graham 1969: at most 4/3 of the best possible time).
    """
    loads = [(0, process) for process in range(count)]
    own = []
    for batch in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, process = loads[0]
        heapq.heapreplace(loads, (load + costs[batch], process))
        if process == rank:
            own.append(batch)
    return sorted(own)
