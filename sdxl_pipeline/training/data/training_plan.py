"""Step, batch and image counts of a run, computed from the crop plans alone, before anything is encoded. Imports no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import TrainingPlan
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, total_planned_steps
from sdxl_pipeline.training.data.samples import Samples, held_out_keys
from sdxl_pipeline.training.data.sampling_weights import plan_sampling_weights


class PlannedDataset(NamedTuple):
    """The crop plan of one dataset and its sampling settings."""

    dataset_id: str
    rows: pd.DataFrame
    repeats: int
    probability: float


def plan_training(
    datasets: Sequence[PlannedDataset], settings: TrainingSettings, num_processes: int
) -> TrainingPlan:
    """Return the counts of a run. Raises UserError if the images do not fill a step, or the steps are fewer than the warm-up."""
    held_out_anywhere = held_out_keys(dataset.rows for dataset in datasets)
    rows = pd.concat([_train_rows(dataset) for dataset in datasets], ignore_index=True)
    samples = Samples(rows[~rows["key"].isin(held_out_anywhere)])
    weights = plan_sampling_weights(datasets, samples, settings, num_processes)
    sampler = BucketBatchSampler(
        samples,
        weights.by_dataset,
        settings.seed,
        settings.train_batch_size,
        num_processes,
        settings.bucket_fill,
    )
    held_out = {
        dataset.dataset_id: int(dataset.rows.loc[dataset.rows["split"] == "eval", "path"].nunique())
        for dataset in datasets
    }
    return TrainingPlan(
        steps=total_planned_steps(settings, sampler),
        batches_per_epoch=sampler.batches_in(0),
        images_per_epoch=sampler.images_until(sampler.batches_in(0)),
        trained_images=samples.images_by_dataset(),
        held_out_images={name: count for name, count in held_out.items() if count},
        appearances=sampler.appearances(),
        raised_repeats=dict(weights.raised_repeats),
    )


def _train_rows(dataset: PlannedDataset) -> pd.DataFrame:
    """Return the columns of `Samples` that determine the batches."""
    rows = dataset.rows.loc[
        dataset.rows["split"] == "train", ["key", "crop_index", "path", "bucket_h", "bucket_w"]
    ]
    copy = rows.groupby(["key", "crop_index"], sort=False).cumcount()
    return rows.assign(dataset_id=pd.Series(dataset.dataset_id, index=rows.index, dtype="str"), copy=copy)
