"""How often an epoch shows the images of each dataset, and whether that fills a step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Samples


class SampledDataset(Protocol):
    """A dataset and how often its images are shown, such as a TrainingDataset."""

    @property
    def dataset_id(self) -> str:
        """Name of the dataset."""

    @property
    def repeats(self) -> int:
        """Extra appearances per epoch."""

    @property
    def probability(self) -> float:
        """Relative sampling weight."""


@dataclass(frozen=True)
class SamplingWeights:
    """What an epoch takes of each dataset."""

    by_dataset: Mapping[str, float]
    raised_repeats: Mapping[str, int] = field(default_factory=dict)
    """The `repeats` that stand in for those of the settings, where these would not fill a step."""


def sampling_weights_per_epoch(datasets: Sequence[SampledDataset], samples: Samples) -> dict[str, float]:
    """How often the images of each dataset among `samples` appear in an epoch.

    That is repeats + 1, times the dataset's probability relative to the largest one.
    """
    present = samples.images_by_dataset()
    used = [dataset for dataset in datasets if dataset.dataset_id in present]
    largest = max((dataset.probability for dataset in used), default=1.0)
    return {dataset.dataset_id: (dataset.repeats + 1) * dataset.probability / largest for dataset in used}


def plan_sampling_weights(
    datasets: Sequence[SampledDataset], samples: Samples, settings: TrainingSettings, num_processes: int
) -> SamplingWeights:
    """`sampling_weights_per_epoch`, if one epoch fills one optimizer step, counted over all datasets together, since they share their batches.

    Else, with `allow_dataset_oversubscription`, every dataset's passes are multiplied by the smallest whole number that does it, which
    leaves their shares as they are; without it UserError names the numbers and the `repeats` that would do.
    """
    counts = samples.images_by_dataset()
    if not counts:
        raise UserError(
            "there is no image to train on: the datasets' aspect_buckets have no row of the split 'train'"
        )
    passes = sampling_weights_per_epoch(datasets, samples)

    def images(factor: int) -> int:
        return sum(math.floor(count * passes[name] * factor) for name, count in counts.items())

    accumulation = settings.gradient_accumulation_steps
    need = settings.train_batch_size * num_processes * accumulation
    have = images(1)
    if have >= need:
        return SamplingWeights(passes)
    if settings.allow_dataset_oversubscription:
        factor = max(2, math.ceil(need / sum(count * passes[name] for name, count in counts.items())))
        while images(factor) < need:  # part of an image is none
            factor += 1
        return SamplingWeights(
            {name: value * factor for name, value in passes.items()},
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
    own = counts[largest.dataset_id] * passes[largest.dataset_id]
    lacking = need - have + math.floor(own)
    repeats = math.ceil(lacking * (largest.repeats + 1) / own) - 1
    raise UserError(
        f"the datasets give {have} images an epoch, but one step takes {need}: train_batch_size {settings.train_batch_size} x "
        f'{num_processes} processes x gradient_accumulation_steps {accumulation}. Set "repeats": {repeats} for dataset '
        f"{largest.dataset_id!r} in the data backend file, or lower one of the three, or set allow_dataset_oversubscription to have them raised"
    )
