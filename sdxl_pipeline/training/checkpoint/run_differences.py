"""What makes the weights of two runs differ, from their specs. Imports no torch."""

import json
from pathlib import Path

from sdxl_pipeline.runtime.specs import TrainingDataset, TrainSpec
from sdxl_pipeline.training.checkpoint.run_identity import change_affects_weights, setting_changes


def differences(other: TrainSpec, spec: TrainSpec) -> list[str]:
    """Return descriptions of what makes the weights of `spec` differ from those of `other`, as "name: old -> new"."""
    changes = [
        f"{key}: {json.dumps(old)} -> {json.dumps(new)}"
        for key, (old, new) in setting_changes(other, spec).items()
        if change_affects_weights(key)
    ]
    if other.base_model.digest != spec.base_model.digest:
        changes.append(f"base model: {other.base_model.source} -> {spec.base_model.source}")
    old_datasets, new_datasets = (
        {dataset.dataset_id: _dataset_fingerprint(dataset) for dataset in each.datasets}
        for each in (other, spec)
    )
    for dataset_id in sorted(old_datasets.keys() | new_datasets.keys()):
        if old_datasets.get(dataset_id) != new_datasets.get(dataset_id):
            changes.append(f"images, captions or settings of the dataset {dataset_id}")
    return changes


def _dataset_fingerprint(dataset: TrainingDataset) -> tuple[object, ...]:
    """Return what determines the samples of a dataset; the names of its tables contain their digests."""
    return (
        *(Path(dataset.rows_path).name, dataset.latents.digest, dataset.text_embeds.digest),
        *(dataset.repeats, dataset.probability, dataset.fresh_crops, dataset.is_regularisation),
        dataset.masks and (dataset.masks.kind, Path(dataset.masks.pairs_path).name),
    )
