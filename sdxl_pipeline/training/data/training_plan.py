"""Step, batch and image counts of a run, computed from the crop plans alone, before anything is encoded. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import pandas as pd

from sdxl_pipeline.config.schema.optimization import OptimizationSettings
from sdxl_pipeline.runtime.specs import TrainingPlan
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, total_planned_steps
from sdxl_pipeline.training.data.samples import Samples, held_out_keys


class SampledDataset(Protocol):
    """A dataset with its sampling settings, such as a TrainingDataset."""

    @property
    def dataset_id(self) -> str:
        """Return the name of the dataset."""

    @property
    def repeats(self) -> int:
        """Return the extra appearances of each image per epoch."""

    @property
    def probability(self) -> float:
        """Return the relative sampling weight."""


@dataclass(frozen=True)
class SamplingWeights:
    """Appearances of an image of each dataset in an epoch."""

    by_dataset: Mapping[str, float]
    raised_repeats: Mapping[str, int] = field(default_factory=dict)
    """The `repeats` used instead of the configured ones, where these would not fill a step."""


def sampling_weights_per_epoch(datasets: Sequence[SampledDataset], samples: Samples) -> dict[str, float]:
    """Return how often the images of each dataset among `samples` appear in an epoch.

    That is (repeats + 1) times the dataset's probability relative to the largest one.
    """
    present = samples.images_by_dataset()
    used = [dataset for dataset in datasets if dataset.dataset_id in present]
    largest = max((dataset.probability for dataset in used), default=1.0)
    return {dataset.dataset_id: (dataset.repeats + 1) * dataset.probability / largest for dataset in used}


def plan_sampling_weights(
    datasets: Sequence[SampledDataset],
    samples: Samples,
    settings: OptimizationSettings,
    num_processes: int,
    allow_oversubscription: bool,
) -> SamplingWeights:
    """Return `sampling_weights_per_epoch` if one epoch fills one optimizer step, counting all datasets together, since they share batches.

    Otherwise, with `allow_oversubscription`, multiply all weights by the smallest integer that fills a step, which keeps their
    ratios; without it, raise UserError with the counts and the `repeats` that would suffice. Also raise UserError if there are no images.
    """
    counts = samples.images_by_dataset()
    if not counts:
        raise UserError(
            "there is no image to train on: the datasets' aspect_buckets have no row of the split 'train'"
        )
    weights = sampling_weights_per_epoch(datasets, samples)

    def images(factor: int) -> int:
        return sum(math.floor(count * weights[name] * factor) for name, count in counts.items())

    accumulation = settings.gradient_accumulation_steps
    required = settings.train_batch_size * num_processes * accumulation
    available = images(1)
    if available >= required:
        return SamplingWeights(weights)
    if allow_oversubscription:
        factor = max(2, math.ceil(required / sum(count * weights[name] for name, count in counts.items())))
        while images(factor) < required:  # fractions of an image are rounded down
            factor += 1
        return SamplingWeights(
            {name: weight * factor for name, weight in weights.items()},
            {
                dataset.dataset_id: (dataset.repeats + 1) * factor - 1
                for dataset in datasets
                if dataset.dataset_id in counts
            },
        )
    largest = max(
        (dataset for dataset in datasets if dataset.dataset_id in counts),
        key=lambda dataset: counts[dataset.dataset_id],
    )
    largest_images = counts[largest.dataset_id] * weights[largest.dataset_id]
    lacking = required - available + math.floor(largest_images)
    repeats = math.ceil(lacking * (largest.repeats + 1) / largest_images) - 1
    raise UserError(
        f"the datasets give {available} images an epoch, but one step takes {required}: train_batch_size {settings.train_batch_size} x "
        f'{num_processes} processes x gradient_accumulation_steps {accumulation}. Set "repeats": {repeats} for dataset '
        f"{largest.dataset_id!r} in the data backend file, or lower one of the three, or set allow_dataset_oversubscription to raise the repeats automatically"
    )


class PlannedDataset(NamedTuple):
    """The crop plan of one dataset and its sampling settings."""

    dataset_id: str
    rows: pd.DataFrame
    repeats: int
    probability: float


def plan_training(
    datasets: Sequence[PlannedDataset],
    settings: OptimizationSettings,
    num_processes: int,
    allow_oversubscription: bool,
) -> TrainingPlan:
    """Return the counts of a run. Raises UserError if the images do not fill a step, or the steps are fewer than the warm-up."""
    held_out_anywhere = held_out_keys(dataset.rows for dataset in datasets)
    rows = pd.concat([_train_rows(dataset) for dataset in datasets], ignore_index=True)
    samples = Samples(rows[~rows["key"].isin(held_out_anywhere)])
    weights = plan_sampling_weights(datasets, samples, settings, num_processes, allow_oversubscription)
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
