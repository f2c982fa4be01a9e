"""Training datasets with masks."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.runtime.specs import DatasetMasks, TrainingDataset


def masked_dataset(
    dataset: TrainingDataset, folder: Path, images: Sequence[int] | None = None
) -> TrainingDataset:
    """Return the dataset with a different random grey mask for each of its images with these indices, or for all."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    rows = pd.read_parquet(dataset.rows_path).drop_duplicates("path")
    for number, row in enumerate(rows.itertuples()):
        if images is not None and number not in images:
            continue
        random = np.random.default_rng(number)
        values = random.integers(0, 255, (row.original_h // 4, row.original_w // 4), dtype=np.uint8)
        path = folder / f"{Path(row.path).stem}.png"
        Image.fromarray(values).save(path)
        key = sha256(path.read_bytes()).hexdigest()
        pairs.append({"path": row.path, "key": row.key, "mask_path": path.name, "mask_key": key})
    table = folder / "pairs.parquet"
    pd.DataFrame(pairs).to_parquet(table)
    dataset_masks = DatasetMasks(kind="mask", data_dir=str(folder), pairs_path=str(table))
    return dataset.model_copy(update={"masks": dataset_masks})
