"""What counts in the loss of a batch: the places that masks leave, and images whose target is the base model's prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.training.data.loss_masks import MaskReader
from sdxl_pipeline.training.data.mask_tables import mask_tables
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.rng import uniform


@dataclass(frozen=True)
class LossMask:
    """What counts of some images."""

    keys: tuple[str, ...]
    weights: (
        Tensor | None
    )  # (B, 1, H/8, W/8) or (B, 1, 1, 1) float32: what each place counts; None: all the same
    prior: tuple[bool, ...]  # whether the target is the base model's prediction; (): of none


@dataclass(frozen=True)
class LossWeights:
    """What counts of each image in each batch: a pure function of (seed, batch, slot) and the image."""

    masks: MaskReader | None = None
    """None where no dataset has masks."""
    masked_share: float = 1.0
    """Share of the appearances of masked images that are masked."""
    prior: frozenset[str] = frozenset()
    """The datasets of regularisation images."""
    prior_weight: float = 1.0
    """What these count, beside 1 of all others."""
    asks_base: bool = True
    """Whether their target is the base model's prediction. Where the base model's own weights are trained, there is none to ask."""

    def of(self, samples: Sequence[Sample], seed: int, index: int, slots: Sequence[int]) -> LossMask:
        """What counts of samples of one bucket that have these slots in the global batch `index`."""
        keys = tuple(sample.key for sample in samples)
        prior = tuple(sample.dataset_id in self.prior for sample in samples)
        weights = None
        if self.masks is not None:
            masked = [uniform(seed, "masked loss", index, slot) < self.masked_share for slot in slots]
            read = self.masks.read(samples, masked)
            keys, weights = read.keys, read.weights
        if self.prior and self.prior_weight != 1.0:
            counted = torch.tensor([self.prior_weight if each else 1.0 for each in prior])[
                :, None, None, None
            ]
            weights = counted if weights is None else weights * counted
        return LossMask(keys, weights, prior if self.prior and self.asks_base else ())


def build_loss_weights(spec: TrainSpec) -> LossWeights:
    """What the spec says of its datasets."""
    tables = mask_tables(spec.datasets)
    return LossWeights(
        masks=MaskReader(tables) if tables else None,
        masked_share=spec.settings.masked_loss_probability,
        prior=frozenset(dataset.dataset_id for dataset in spec.datasets if dataset.is_regularisation),
        prior_weight=spec.settings.prior_loss_weight,
        asks_base=spec.settings.model_type != "full",
    )


ALL_ALIKE = LossWeights()
"""Of runs without masks and regularisation images."""
