"""Sample tables built without any files."""

from collections.abc import Sequence

import pandas as pd

from sdxl_pipeline.training.data.samples import Samples
from tests.support.training_datasets import SQUARE, digest


def sample_rows(
    count: int,
    dataset_id: str = "d",
    buckets: Sequence[tuple[int, int]] = (SQUARE,),
    captions: int = 1,
    first: int = 0,
    crops: int = 1,
) -> pd.DataFrame:
    """Return the rows of `count` images; crop i of each is in bucket i modulo the number of buckets."""
    return pd.DataFrame(
        {
            "dataset_id": dataset_id,
            "key": digest(dataset_id, index),
            "copy": 0,
            "crop_index": crop,
            "path": f"{index:03d}.png",
            "latent_key": digest("latent", index, crop),
            "bucket_h": buckets[crop % len(buckets)][0],
            "bucket_w": buckets[crop % len(buckets)][1],
            **dict.fromkeys(("resized_h", "resized_w", "original_h", "original_w"), 96),
            **dict.fromkeys(("source_h", "source_w", "original_height", "original_width"), 96),
            "crop_top": 0,
            "crop_left": 0,
            "flipped": False,
            "embed_keys": " ".join(f"caption_{number}" for number in range(captions)),
        }
        for index in range(first, first + count)
        for crop in range(crops)
    )


def samples_of(*frames: pd.DataFrame) -> Samples:
    """Return the samples of tables of `sample_rows`."""
    return Samples(pd.concat(frames, ignore_index=True))
