"""Which samples make up which batch: a pure function of (seed, epoch, step, rank).

An epoch shows each image as often as its dataset asks, whatever number of crops it has; an image's crops take turns. All is computed
in columns, so that an epoch of a million images is planned in about a second.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdxl_pipeline.config.schema.optimization import BucketFill
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Sample, Samples
from sdxl_pipeline.training.rng import choose, derive_seed, scattered


@dataclass(frozen=True, slots=True)
class SampleRef:
    """One appearance of an image in an epoch, with the crop and the caption that were chosen for it."""

    sample: Sample
    epoch: int
    occurrence: int  # 0 at its first appearance in the epoch, 1 at its second, ...
    embed_key: str


class _Draws(NamedTuple):
    """The appearances of an epoch, images in their order: int64 of shape (draws,) each."""

    image: np.ndarray
    occurrence: np.ndarray
    sample: np.ndarray


class _Plan(NamedTuple):
    """The global batches of an epoch, one after the other: int64 of shape (draws,) each."""

    sample: np.ndarray
    occurrence: np.ndarray
    starts: np.ndarray  # (batches + 1,): batch i is sample[starts[i] : starts[i + 1]]


class BucketBatchSampler:
    """The batches of a run, in order.

    A *global batch* is what all processes together take in one forward pass: at most `batch_size * num_processes` draws from one
    bucket. Each process takes its own consecutive part of it, which is empty for some where the batch has fewer draws than there are
    processes; with twice the processes and half the batch size the same images meet. Where the draws of a bucket do not fill its last
    batch, `fill` decides: "partial" leaves the batch smaller, "wrap" repeats the bucket's first draws.

    `passes` says how often the images of each dataset appear in an epoch. Where that is no whole number, images take turns: each
    appears as often as any other of its dataset, give or take one. Likewise the n crops of an image take turns: any n appearances of
    it in a row show each once, beginning with one drawn for the image.
    """

    def __init__(
        self,
        samples: Samples,
        passes: Mapping[str, float],
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
        self._passes, self._phases = self._spread(passes)
        self._first_crop = scattered(samples.random_draws, derive_seed(seed, "first crop")) >> np.uint64(1)
        self._epoch_starts = [0]  # index of each epoch's first global batch, as far as they were asked for
        self._image_starts = [0]  # and the images in the batches before it
        self._planned: dict[int, _Plan] = {}

    def batch(self, index: int, rank: int) -> list[SampleRef]:
        """Return the draws of process `rank` in the global batch `index`, counted from the start of the run."""
        slots = self.slots(index, rank)
        return self.draws(index)[slots.start : slots.stop]

    def draws(self, index: int) -> list[SampleRef]:
        """Return the draws of all processes in a global batch."""
        epoch, place = self.locate(index)
        plan = self._plan(epoch)
        own = slice(plan.starts[place], plan.starts[place + 1])
        chosen = zip(plan.sample[own].tolist(), plan.occurrence[own].tolist(), strict=True)
        return [self._draw(self.samples[sample], epoch, occurrence) for sample, occurrence in chosen]

    def slots(self, index: int, rank: int) -> range:
        """Return the places of the draws of process `rank` among those of all processes in a global batch."""
        size = self.size(index)
        return range(rank * size // self.num_processes, (rank + 1) * size // self.num_processes)

    def size(self, index: int) -> int:
        """Return the number of draws in a global batch."""
        epoch, place = self.locate(index)
        starts = self._plan(epoch).starts
        return int(starts[place + 1] - starts[place])

    def images_until(self, index: int) -> int:
        """Return the number of draws in the first `index` global batches of the run."""
        epoch, place = self.locate(index)
        return self._image_starts[epoch] + (int(self._plan(epoch).starts[place]) if place else 0)

    def appearances(self, epoch: int = 0) -> dict[str, tuple[int, int]]:
        """Return how often the images of each dataset appear in an epoch: (fewest, most)."""
        images = np.searchsorted(self.samples.first, self._plan(epoch).sample, side="right") - 1
        codes, names = self.samples.datasets
        counts = np.bincount(images, minlength=len(codes))
        return {
            name: (int(counts[codes == code].min()), int(counts[codes == code].max()))
            for code, name in enumerate(names)
        }

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place within it) of a global batch."""
        while self._epoch_starts[-1] <= index:
            self._start_next_epoch()
        epoch = bisect.bisect_right(self._epoch_starts, index) - 1
        return epoch, index - self._epoch_starts[epoch]

    def batches_until(self, epoch: int) -> int:
        """How many global batches the first `epoch` epochs hold."""
        while len(self._epoch_starts) <= epoch:
            self._start_next_epoch()
        return self._epoch_starts[epoch]

    def batches_in(self, epoch: int) -> int:
        """How many global batches an epoch holds."""
        return self.batches_until(epoch + 1) - self.batches_until(epoch)

    def unfilled(self, epoch: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
        """Return for each bucket whose draws do not fill its last batch: (draws, draws that are missing)."""
        counts = zip(self.samples.buckets[1], self._draws_by_bucket(epoch).tolist(), strict=True)
        missing = {bucket: (draws, -draws % self.global_batch_size) for bucket, draws in counts}
        return {bucket: numbers for bucket, numbers in missing.items() if numbers[1]}

    def _spread(self, passes: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Per image its passes an epoch, and where between two of its appearances the run begins, in [0, 1).

        Up to the end of epoch e an image has appeared floor(passes * (e + 1) + phase) times. Phases are evenly spaced over a dataset in
        an order drawn by lot, so every epoch shows the same number of its images, give or take one, and at least one.
        """
        codes, names = self.samples.datasets
        spread = np.zeros(len(codes)), np.zeros(len(codes))
        random_draws = scattered(self.samples.random_draws, derive_seed(self.seed, "phase"))
        for code, name in enumerate(names):
            own = np.flatnonzero(codes == code)
            times = max(passes[name], 1 / len(own))
            spread[0][own] = times
            if times % 1:
                spread[1][own[np.argsort(random_draws[own], kind="stable")]] = (
                    np.arange(len(own)) + 0.5
                ) / len(own)
        return spread

    def _start_next_epoch(self) -> None:
        # epochs may differ by a batch where images or crops of other buckets have their turn, so they are counted one by one
        draws = self._draws_by_bucket(len(self._epoch_starts) - 1)
        batches = int((-(-draws // self.global_batch_size)).sum())
        images = int(draws.sum()) if self._fill == "partial" else batches * self.global_batch_size
        self._epoch_starts.append(self._epoch_starts[-1] + batches)
        self._image_starts.append(self._image_starts[-1] + images)

    def _draws_by_bucket(self, epoch: int) -> np.ndarray:
        codes, sizes = self.samples.buckets
        return np.bincount(codes[self._draws(epoch).sample], minlength=len(sizes))

    def _draws(self, epoch: int) -> _Draws:
        """Every appearance of every image in an epoch, with its crop."""
        begin, end = (
            np.floor(self._passes * count + self._phases).astype(np.int64) for count in (epoch, epoch + 1)
        )
        times = end - begin
        image = np.repeat(np.arange(len(times)), times)
        occurrence = np.arange(len(image)) - np.repeat(np.cumsum(times) - times, times)
        crops = self.samples.crops
        if len(crops) == len(self.samples):  # one each
            return _Draws(image, occurrence, image)
        turn = (self._first_crop.astype(np.int64) % crops + begin)[image] + occurrence
        return _Draws(image, occurrence, self.samples.first[image] + turn % crops[image])

    def _plan(self, epoch: int) -> _Plan:
        """The global batches of an epoch; two are kept, since an optimizer step may end in the epoch after."""
        if epoch in self._planned:
            return self._planned[epoch]
        draws = self._draws(epoch)
        codes, sizes = self.samples.buckets
        bucket = codes[draws.sample]
        names = self.samples.random_draws[draws.image] + draws.occurrence.astype(np.uint64)
        random_draws = scattered(
            scattered(names, derive_seed(self.seed, "order")), derive_seed(self.seed, "order of", epoch)
        )
        shuffled = np.lexsort((random_draws, bucket))
        ends = np.cumsum(np.bincount(bucket, minlength=len(sizes)))
        full = self.global_batch_size
        taken, lengths, places = [], [], []
        for size, own in zip(sizes, np.split(shuffled, ends[:-1]), strict=True):
            count = -(-len(own) // full)
            if self._fill == "wrap":
                own = np.resize(own, count * full)
            taken.append(own)
            lengths.append(np.minimum(full, len(own) - full * np.arange(count)))
            places.append(
                scattered(np.arange(count, dtype=np.uint64), derive_seed(self.seed, "batch", epoch, *size))
            )
        shuffled_batches = np.argsort(np.concatenate(places), kind="stable")
        length = np.concatenate(lengths)
        begins = np.cumsum(length) - length
        length, begins = length[shuffled_batches], begins[shuffled_batches]
        starts = np.concatenate([[0], np.cumsum(length)])
        order = np.concatenate(taken)[np.repeat(begins - starts[:-1], length) + np.arange(starts[-1])]
        self._planned = {
            **dict(list(self._planned.items())[-1:]),
            epoch: _Plan(draws.sample[order], draws.occurrence[order], starts),
        }
        return self._planned[epoch]

    def _draw(self, sample: Sample, epoch: int, occurrence: int) -> SampleRef:
        caption = choose(len(sample.embed_keys), self.seed, "caption", epoch, sample.image, occurrence)
        return SampleRef(sample, epoch, occurrence, sample.embed_keys[caption])


def total_planned_steps(settings: TrainingSettings, order: BucketBatchSampler) -> int:
    """Return the optimizer steps of a run: as many as the settings ask for, or as their epochs take.

    Raises UserError when the epochs take too few steps for the warm-up; max_train_steps is compared when the settings are read.
    """
    if settings.max_train_steps is not None:
        return settings.max_train_steps
    epochs, parts = settings.num_train_epochs or 1, settings.gradient_accumulation_steps
    batches = order.batches_until(epochs)
    steps = math.ceil(batches / parts)
    if settings.lr_warmup_steps > settings.longest_warmup(steps):
        raise UserError(
            f"lr_warmup_steps is {settings.lr_warmup_steps}, but the training has only {steps} steps, so learning_rate would never be "
            f"reached: {batches} batches in num_train_epochs {epochs}, by gradient_accumulation_steps {parts}. "
            f"Write at most {settings.longest_warmup(steps)}, or more epochs"
        )
    return steps
