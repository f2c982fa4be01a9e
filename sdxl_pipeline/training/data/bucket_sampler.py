"""Batch sampling by aspect bucket: a pure function of (seed, epoch, step, rank).

An epoch contains each image as often as its dataset's sampling weight requires, independent of its number of crops; the crops of an image
alternate. Everything is computed in columns, so that an epoch of a million images is planned in about a second.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdxl_pipeline.config.schema.optimization import BucketFill, OptimizationSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Sample, Samples
from sdxl_pipeline.training.rng import choose, derive_seed, mix_hashes


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One appearance of an image in an epoch, with the crop and the caption chosen for it."""

    sample: Sample
    epoch: int
    occurrence: int  # index of this appearance of the image in the epoch
    embed_key: str


class _Appearances(NamedTuple):
    """The appearances of an epoch in the order of the images: int64 of shape (appearances,) each."""

    image: np.ndarray
    occurrence: np.ndarray
    sample: np.ndarray


class _EpochPlan(NamedTuple):
    """The global batches of an epoch, concatenated: int64 of shape (appearances,) each."""

    sample: np.ndarray
    occurrence: np.ndarray
    starts: np.ndarray  # (batches + 1,): batch i is sample[starts[i] : starts[i + 1]]


class BucketBatchSampler:
    """The batches of a run, in order.

    A *global batch* is what all processes together process in one forward pass: at most `batch_size * num_processes` samples of one
    bucket. Each process takes its own contiguous part, which is empty for some if the batch has fewer samples than there are processes;
    twice the processes with half the batch size give the same global batches. If the samples of a bucket do not fill its last batch,
    `fill` decides: "partial" leaves the batch smaller, "wrap" repeats the bucket's first samples.

    `weights` is how often the images of each dataset appear in an epoch. If that is not an integer, the images alternate over the epochs:
    each appears as often as any other of its dataset, to within one. Likewise the n crops of an image alternate: any n consecutive
    appearances contain each crop once, starting with a random one per image.
    """

    def __init__(
        self,
        samples: Samples,
        weights: Mapping[str, float],
        seed: int,
        batch_size: int,
        num_processes: int = 1,
        fill: BucketFill = "partial",
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.num_processes = num_processes
        self.global_batch_size = batch_size * num_processes
        self._fill = fill
        self._weights, self._phases = self._weights_and_phases(weights)
        self._first_crop = mix_hashes(samples.image_hashes, derive_seed(seed, "first crop")) >> np.uint64(1)
        self._epoch_starts = [0]  # index of each epoch's first global batch, extended on demand
        self._image_starts = [0]  # images in all batches before that one
        self._planned: dict[int, _EpochPlan] = {}

    def batch(self, index: int, rank: int) -> list[SampleRef]:
        """Return the samples of process `rank` in the global batch `index`, counted from the start of the run."""
        slots = self.slots(index, rank)
        return self.global_batch(index)[slots.start : slots.stop]

    def global_batch(self, index: int) -> list[SampleRef]:
        """Return the samples of all processes in a global batch."""
        epoch, position = self.locate(index)
        plan = self._plan(epoch)
        batch = slice(plan.starts[position], plan.starts[position + 1])
        chosen = zip(plan.sample[batch].tolist(), plan.occurrence[batch].tolist(), strict=True)
        return [self._sample_ref(self.samples[sample], epoch, occurrence) for sample, occurrence in chosen]

    def slots(self, index: int, rank: int) -> range:
        """Return the indices of the samples of process `rank` within a global batch."""
        size = self.size(index)
        return range(rank * size // self.num_processes, (rank + 1) * size // self.num_processes)

    def size(self, index: int) -> int:
        """Return the number of samples in a global batch."""
        epoch, position = self.locate(index)
        starts = self._plan(epoch).starts
        return int(starts[position + 1] - starts[position])

    def images_until(self, index: int) -> int:
        """Return the number of samples in the first `index` global batches of the run."""
        epoch, position = self.locate(index)
        return self._image_starts[epoch] + (int(self._plan(epoch).starts[position]) if position else 0)

    def appearances(self, epoch: int = 0) -> dict[str, tuple[int, int]]:
        """Return how often the images of each dataset appear in an epoch: (fewest, most)."""
        images = np.searchsorted(self.samples.image_starts, self._plan(epoch).sample, side="right") - 1
        codes, names = self.samples.datasets
        counts = np.bincount(images, minlength=len(codes))
        return {
            name: (int(counts[codes == code].min()), int(counts[codes == code].max()))
            for code, name in enumerate(names)
        }

    def locate(self, index: int) -> tuple[int, int]:
        """Return (epoch, index within it) of a global batch."""
        while self._epoch_starts[-1] <= index:
            self._start_next_epoch()
        epoch = bisect.bisect_right(self._epoch_starts, index) - 1
        return epoch, index - self._epoch_starts[epoch]

    def epochs_after(self, batches: int) -> float:
        """Return the epochs after a number of global batches, as a fraction."""
        epoch, batch = self.locate(batches)
        return epoch + batch / self.batches_in(epoch)

    def batches_until(self, epoch: int) -> int:
        """Return the number of global batches in the first `epoch` epochs."""
        while len(self._epoch_starts) <= epoch:
            self._start_next_epoch()
        return self._epoch_starts[epoch]

    def batches_in(self, epoch: int) -> int:
        """Return the number of global batches in an epoch."""
        return self.batches_until(epoch + 1) - self.batches_until(epoch)

    def partial_buckets(self, epoch: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
        """Return, for each bucket whose samples do not fill its last batch: (samples, missing samples)."""
        counts = zip(self.samples.buckets[1], self._appearances_by_bucket(epoch).tolist(), strict=True)
        missing = {bucket: (count, -count % self.global_batch_size) for bucket, count in counts}
        return {bucket: counts for bucket, counts in missing.items() if counts[1]}

    def _weights_and_phases(self, weights: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return, per image, its appearances per epoch and its phase in [0, 1).

        Up to the end of epoch e an image has appeared floor(weight * (e + 1) + phase) times. Phases are evenly spaced over a dataset in random
        order, so every epoch contains the same number of its images, to within one, and at least one.
        """
        codes, names = self.samples.datasets
        per_image, phases = np.zeros(len(codes)), np.zeros(len(codes))
        hashes = mix_hashes(self.samples.image_hashes, derive_seed(self.seed, "phase"))
        for code, name in enumerate(names):
            images = np.flatnonzero(codes == code)
            weight = max(weights[name], 1 / len(images))
            per_image[images] = weight
            if weight % 1:
                shuffled = images[np.argsort(hashes[images], kind="stable")]
                phases[shuffled] = (np.arange(len(images)) + 0.5) / len(images)
        return per_image, phases

    def _start_next_epoch(self) -> None:
        # the number of batches may differ between epochs, because alternating images and crops may be in different buckets
        counts = self._appearances_by_bucket(len(self._epoch_starts) - 1)
        batches = int((-(-counts // self.global_batch_size)).sum())
        images = int(counts.sum()) if self._fill == "partial" else batches * self.global_batch_size
        self._epoch_starts.append(self._epoch_starts[-1] + batches)
        self._image_starts.append(self._image_starts[-1] + images)

    def _appearances_by_bucket(self, epoch: int) -> np.ndarray:
        codes, sizes = self.samples.buckets
        return np.bincount(codes[self._appearances(epoch).sample], minlength=len(sizes))

    def _appearances(self, epoch: int) -> _Appearances:
        """Return every appearance of every image in an epoch, with its crop."""
        begin, end = (
            np.floor(self._weights * count + self._phases).astype(np.int64) for count in (epoch, epoch + 1)
        )
        counts = end - begin
        image = np.repeat(np.arange(len(counts)), counts)
        occurrence = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
        crops = self.samples.crop_counts
        if len(crops) == len(self.samples):  # one crop per image
            return _Appearances(image, occurrence, image)
        crop_turn = (self._first_crop.astype(np.int64) % crops + begin)[image] + occurrence
        return _Appearances(image, occurrence, self.samples.image_starts[image] + crop_turn % crops[image])

    def _plan(self, epoch: int) -> _EpochPlan:
        """Return the global batches of an epoch; two epochs are cached, since an optimizer step may span both."""
        if epoch in self._planned:
            return self._planned[epoch]
        appearances = self._appearances(epoch)
        codes, sizes = self.samples.buckets
        bucket = codes[appearances.sample]
        hashes = self.samples.image_hashes[appearances.image] + appearances.occurrence.astype(np.uint64)
        keys = mix_hashes(
            mix_hashes(hashes, derive_seed(self.seed, "order")), derive_seed(self.seed, "order of", epoch)
        )
        shuffled = np.lexsort((keys, bucket))
        ends = np.cumsum(np.bincount(bucket, minlength=len(sizes)))
        full = self.global_batch_size
        selected, lengths, batch_keys = [], [], []
        for size, indices in zip(sizes, np.split(shuffled, ends[:-1]), strict=True):
            count = -(-len(indices) // full)
            if self._fill == "wrap":
                indices = np.resize(indices, count * full)
            selected.append(indices)
            lengths.append(np.minimum(full, len(indices) - full * np.arange(count)))
            batch_keys.append(
                mix_hashes(np.arange(count, dtype=np.uint64), derive_seed(self.seed, "batch", epoch, *size))
            )
        shuffled_batches = np.argsort(np.concatenate(batch_keys), kind="stable")
        length = np.concatenate(lengths)
        begins = np.cumsum(length) - length
        length, begins = length[shuffled_batches], begins[shuffled_batches]
        starts = np.concatenate([[0], np.cumsum(length)])
        order = np.concatenate(selected)[np.repeat(begins - starts[:-1], length) + np.arange(starts[-1])]
        self._planned = {
            **dict(list(self._planned.items())[-1:]),
            epoch: _EpochPlan(appearances.sample[order], appearances.occurrence[order], starts),
        }
        return self._planned[epoch]

    def _sample_ref(self, sample: Sample, epoch: int, occurrence: int) -> SampleRef:
        caption = choose(len(sample.embed_keys), self.seed, "caption", epoch, sample.image, occurrence)
        return SampleRef(sample, epoch, occurrence, sample.embed_keys[caption])


def total_planned_steps(settings: OptimizationSettings, sampler: BucketBatchSampler) -> int:
    """Return the optimizer steps of a run: `max_train_steps`, or the number that its epochs take.

    Raises UserError if the epochs take too few steps for the warm-up; max_train_steps is checked when the settings are loaded.
    """
    if settings.max_train_steps is not None:
        return settings.max_train_steps
    epochs, accumulation = settings.num_train_epochs or 1, settings.gradient_accumulation_steps
    batches = sampler.batches_until(epochs)
    steps = math.ceil(batches / accumulation)
    if settings.lr_warmup_steps > settings.longest_warmup(steps):
        raise UserError(
            f"lr_warmup_steps is {settings.lr_warmup_steps}, but the run has only {steps} steps, so learning_rate would never be "
            f"reached: {batches} batches in num_train_epochs {epochs}, with gradient_accumulation_steps {accumulation}. "
            f"Set it to at most {settings.longest_warmup(steps)}, or train for more epochs"
        )
    return steps
