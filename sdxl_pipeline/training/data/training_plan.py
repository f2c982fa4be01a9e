"""What a training comes to in numbers, known from the crop plans alone: before anything is encoded. No torch."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import TrainingPlan
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, total_planned_steps
from sdxl_pipeline.training.data.samples import Samples, held_out_keys
from sdxl_pipeline.training.data.sampling_weights import plan_sampling_weights


class PlannedDataset(NamedTuple):
    """The crop plan of one dataset, and how often an epoch shows its images."""

    dataset_id: str
    rows: pd.DataFrame
    repeats: int
    probability: float


def plan_training(
    datasets: Sequence[PlannedDataset], settings: TrainingSettings, num_processes: int
) -> TrainingPlan:
    """Return the numbers of a run. Raises UserError when the images do not fill a step, or the steps are fewer than the warm-up's."""
    held_out_anywhere = held_out_keys(dataset.rows for dataset in datasets)
    rows = pd.concat([_train_rows(dataset) for dataset in datasets], ignore_index=True)
    samples = Samples(rows[~rows["key"].isin(held_out_anywhere)])
    passes = plan_sampling_weights(datasets, samples, settings, num_processes)
    order = BucketBatchSampler(
        samples,
        passes.by_dataset,
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
        steps=total_planned_steps(settings, order),
        batches_per_epoch=order.batches_in(0),
        images_per_epoch=order.images_until(order.batches_in(0)),
        trained_images=samples.images_by_dataset(),
        held_out_images={name: count for name, count in held_out.items() if count},
        appearances=order.appearances(),
        raised_repeats=dict(passes.raised_repeats),
    )


def _train_rows(dataset: PlannedDataset) -> pd.DataFrame:
    """Return as much of `Samples`' columns as the order of samples depends on."""
    rows = dataset.rows.loc[
        dataset.rows["split"] == "train", ["key", "crop_index", "path", "bucket_h", "bucket_w"]
    ]
    copy = rows.groupby(["key", "crop_index"], sort=False).cumcount()
    return rows.assign(dataset_id=pd.Series(dataset.dataset_id, index=rows.index, dtype="str"), copy=copy)
