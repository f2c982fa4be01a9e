"""Mask tables: which mask file belongs to which training image. Imports no torch: the run identity depends on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sdxl_pipeline.config.schema.datasets import MaskKind
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.training.data.samples import Samples


@dataclass(frozen=True)
class MaskTable:
    """The masks of one dataset."""

    kind: MaskKind
    folder: Path
    files: Mapping[str, tuple[str, str]]
    """Digest of an image's bytes -> (path of its mask within `folder`, digest of the mask's bytes)."""


def mask_tables(datasets: Iterable[TrainingDataset]) -> dict[str, MaskTable]:
    """Return the masks of each dataset that has any, by dataset id."""
    tables = {}
    for dataset in datasets:
        if dataset.masks is not None:
            pairs = pd.read_parquet(dataset.masks.pairs_path, columns=["key", "mask_path", "mask_key"])
            files = zip(pairs["mask_path"].tolist(), pairs["mask_key"].tolist(), strict=True)
            tables[dataset.dataset_id] = MaskTable(
                dataset.masks.kind,
                Path(dataset.masks.data_dir),
                dict(zip(pairs["key"].tolist(), files, strict=True)),
            )
    return tables


def masks_identity(datasets: Iterable[TrainingDataset], samples: Samples) -> dict[str, list[str]]:
    """Return, by dataset, its mask kind and a digest over the pairs of image and mask content among `samples`."""
    trained = samples.keys_by_dataset()
    return {
        name: [
            table.kind,
            frame_digest(
                pd.DataFrame(
                    [(key, table.files[key][1]) for key in sorted(trained[name] & table.files.keys())],
                    columns=["key", "mask_key"],
                    dtype="str",
                ),
                ("key", "mask_key"),
            ),
        ]
        for name, table in mask_tables(datasets).items()
        if name in trained
    }
