"""Which samples make up which batch: a pure function of (seed, epoch, step, rank).

An epoch shows each picture as often as its dataset asks, whatever number of crops it has; a picture's crops take turns. All is computed
in columns, so that an epoch of a million pictures is planned in about a second.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdxl_pipeline.training.draws import choose, scattered, seed_for
from sdxl_pipeline.training.samples import Sample, Samples


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of a picture in an epoch, with the crop and the caption that were chosen for it."""

    sample: Sample
    epoch: int
    occurrence: int  # 0 at its first appearance in the epoch, 1 at its second, ...
    embed_key: str


class _Draws(NamedTuple):
    """The appearances of an epoch, pictures in their order: int64 of shape (draws,) each."""

    picture: np.ndarray
    occurrence: np.ndarray
    sample: np.ndarray


class _Plan(NamedTuple):
    """The global batches of an epoch: int64 of shape (batches, global batch size) each."""

    sample: np.ndarray
    occurrence: np.ndarray


class SampleOrder:
    """The batches of a run, in order.

    A *global batch* is what all processes together take in one forward pass: `batch_size * num_processes` draws from one bucket, so
    that the processes have equal work. Each takes its own consecutive part of it; with twice the processes and half the batch size
    the same pictures meet. A bucket whose draws do not fill its last batch is filled by wrapping around to its own first ones.

    `passes` says how often the pictures of each dataset appear in an epoch. Where that is no whole number, pictures take turns: each
    appears as often as any other of its dataset, give or take one. Likewise the n crops of a picture take turns: any n appearances of
    it in a row show each once, beginning with one drawn for the picture.
    """

    def __init__(
        self,
        samples: Samples,
        passes: Mapping[str, float],
        seed: int,
        batch_size: int,
        num_processes: int = 1,
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.batch_size = batch_size
        self.global_batch_size = batch_size * num_processes
        self._passes, self._phases = self._spread(passes)
        self._first_crop = scattered(samples.lots, seed_for(seed, "first crop")) >> np.uint64(1)
        self._epoch_starts = [0]  # index of each epoch's first global batch, as far as they were asked for
        self._planned: tuple[int, _Plan] | None = None

    def batch(self, index: int, rank: int) -> list[Draw]:
        """The draws of process `rank` in the global batch `index`, counted from the start of the run."""
        epoch, place = self.locate(index)
        plan = self._plan(epoch)
        own = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        chosen = zip(plan.sample[place, own].tolist(), plan.occurrence[place, own].tolist(), strict=True)
        return [self._draw(self.samples[sample], epoch, occurrence) for sample, occurrence in chosen]

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

    def fillings(self, epoch: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
        """Per bucket whose last batch had to be filled: (draws it has, draws added by wrapping around)."""
        counts = zip(self.samples.buckets[1], self._draws_by_bucket(epoch).tolist(), strict=True)
        added = {bucket: (draws, -draws % self.global_batch_size) for bucket, draws in counts}
        return {bucket: filling for bucket, filling in added.items() if filling[1]}

    def _spread(self, passes: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Per picture its passes an epoch, and where between two of its appearances the run begins, in [0, 1).

        Up to the end of epoch e a picture has appeared floor(passes * (e + 1) + phase) times. Phases are evenly spaced over a dataset in
        an order drawn by lot, so every epoch shows the same number of its pictures, give or take one, and at least one.
        """
        codes, names = self.samples.datasets
        spread = np.zeros(len(codes)), np.zeros(len(codes))
        lots = scattered(self.samples.lots, seed_for(self.seed, "phase"))
        for code, name in enumerate(names):
            own = np.flatnonzero(codes == code)
            times = max(passes[name], 1 / len(own))
            spread[0][own] = times
            if times % 1:
                spread[1][own[np.argsort(lots[own], kind="stable")]] = (np.arange(len(own)) + 0.5) / len(own)
        return spread

    def _start_next_epoch(self) -> None:
        # epochs may differ by a batch where pictures or crops of other buckets have their turn, so they are counted one by one
        draws = self._draws_by_bucket(len(self._epoch_starts) - 1)
        self._epoch_starts.append(self._epoch_starts[-1] + int((-(-draws // self.global_batch_size)).sum()))

    def _draws_by_bucket(self, epoch: int) -> np.ndarray:
        codes, sizes = self.samples.buckets
        return np.bincount(codes[self._draws(epoch).sample], minlength=len(sizes))

    def _draws(self, epoch: int) -> _Draws:
        """Every appearance of every picture in an epoch, with its crop."""
        begin, end = (
            np.floor(self._passes * count + self._phases).astype(np.int64) for count in (epoch, epoch + 1)
        )
        times = end - begin
        picture = np.repeat(np.arange(len(times)), times)
        occurrence = np.arange(len(picture)) - np.repeat(np.cumsum(times) - times, times)
        crops = self.samples.crops
        if len(crops) == len(self.samples):  # one each
            return _Draws(picture, occurrence, picture)
        turn = (self._first_crop.astype(np.int64) % crops + begin)[picture] + occurrence
        return _Draws(picture, occurrence, self.samples.first[picture] + turn % crops[picture])

    def _plan(self, epoch: int) -> _Plan:
        """The global batches of an epoch; the latest is kept."""
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        draws = self._draws(epoch)
        codes, sizes = self.samples.buckets
        bucket = codes[draws.sample]
        names = self.samples.lots[draws.picture] + draws.occurrence.astype(np.uint64)
        lots = scattered(
            scattered(names, seed_for(self.seed, "order")), seed_for(self.seed, "order of", epoch)
        )
        shuffled = np.lexsort((lots, bucket))
        ends = np.cumsum(np.bincount(bucket, minlength=len(sizes)))
        batches, places = [], []
        for size, own in zip(sizes, np.split(shuffled, ends[:-1]), strict=True):
            count = -(-len(own) // self.global_batch_size)
            batches.append(np.resize(own, (count, self.global_batch_size)))
            places.append(
                scattered(np.arange(count, dtype=np.uint64), seed_for(self.seed, "batch", epoch, *size))
            )
        order = np.concatenate(batches)[np.argsort(np.concatenate(places), kind="stable")]
        self._planned = epoch, _Plan(draws.sample[order], draws.occurrence[order])
        return self._planned[1]

    def _draw(self, sample: Sample, epoch: int, occurrence: int) -> Draw:
        caption = choose(len(sample.embed_keys), self.seed, "caption", epoch, sample.picture, occurrence)
        return Draw(sample, epoch, occurrence, sample.embed_keys[caption])
