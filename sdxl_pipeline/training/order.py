"""Which samples make up which batch: a pure function of (seed, epoch, step, rank)."""

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import TrainingLane
from sdxl_pipeline.training.draws import choose, seed_for
from sdxl_pipeline.training.samples import Sample


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of a sample in an epoch, with the caption that was chosen for it."""

    sample: Sample
    epoch: int
    occurrence: int  # 0 at its first appearance in the epoch, 1 at its second, ...
    embed_key: str


def passes_per_epoch(lanes: Sequence[TrainingLane], samples: Sequence[Sample]) -> dict[str, float]:
    """How often the pictures of each dataset among `samples` appear in an epoch.

    That is repeats + 1, times the dataset's probability relative to the largest one.
    """
    present = {sample.dataset_id for sample in samples}
    used = [lane for lane in lanes if lane.dataset_id in present]
    largest = max((lane.probability for lane in used), default=1.0)
    return {lane.dataset_id: (lane.repeats + 1) * lane.probability / largest for lane in used}


class SampleOrder:
    """The batches of a run, in order.

    A *global batch* is what all processes together take in one forward pass: `batch_size * num_processes` draws from one bucket, so
    that the processes have equal work. Each takes its own consecutive part of it; with twice the processes and half the batch size
    the same pictures meet. A bucket whose draws do not fill its last batch is filled by wrapping around to its own first ones.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        passes: Mapping[str, float],
        seed: int,
        batch_size: int,
        num_processes: int = 1,
    ) -> None:
        self.samples = tuple(samples)
        self.passes = dict(passes)
        self.seed = seed
        self.batch_size = batch_size
        self.global_batch_size = batch_size * num_processes
        self._epoch_starts = [0]  # index of each epoch's first global batch, as far as they were asked for
        self._planned: tuple[int, list[list[Draw]]] | None = None

    def batch(self, index: int, rank: int) -> list[Draw]:
        """The draws of process `rank` in the global batch `index`, counted from the start of the run."""
        epoch, place = self.locate(index)
        whole = self.epoch(epoch)[place]
        return whole[rank * self.batch_size : (rank + 1) * self.batch_size]

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

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """The global batches of an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def fillings(self, epoch: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
        """Per bucket whose last batch had to be filled: (draws it has, draws added by wrapping around)."""
        draws = Counter(draw.sample.bucket for draw in self._draws(epoch))
        added = {bucket: -count % self.global_batch_size for bucket, count in draws.items()}
        return {bucket: (draws[bucket], added[bucket]) for bucket in sorted(draws) if added[bucket]}

    def _start_next_epoch(self) -> None:
        # epochs may differ by a batch where a dataset takes part with a share of its pictures, so they are counted one by one
        self._epoch_starts.append(self._epoch_starts[-1] + len(self.epoch(len(self._epoch_starts) - 1)))

    def _plan(self, epoch: int) -> list[list[Draw]]:
        buckets: dict[tuple[int, int], list[Draw]] = {}
        for draw in self._draws(epoch):
            buckets.setdefault(draw.sample.bucket, []).append(draw)
        batches = []
        for bucket, draws in buckets.items():
            draws.sort(key=lambda d: seed_for(self.seed, "order", epoch, d.sample.id, d.occurrence))
            count = math.ceil(len(draws) / self.global_batch_size)
            endless = itertools.cycle(draws)
            for number in range(count):
                place = seed_for(self.seed, "batch", epoch, *bucket, number)
                batches.append((place, list(itertools.islice(endless, self.global_batch_size))))
        return [batch for _, batch in sorted(batches, key=lambda placed: placed[0])]

    def _draws(self, epoch: int) -> list[Draw]:
        """Every appearance of every sample. A fractional number of passes gives the rest to a part of the dataset, by lot."""
        by_dataset: dict[str, list[Sample]] = {}
        for sample in self.samples:
            by_dataset.setdefault(sample.dataset_id, []).append(sample)
        draws = []
        for dataset_id, samples in by_dataset.items():
            passes = self.passes[dataset_id]
            whole = math.floor(passes)
            extra = round((passes - whole) * len(samples))
            if whole == 0:
                extra = max(extra, 1)
            lots = sorted(samples, key=lambda s: seed_for(self.seed, "extra", epoch, s.id)) if extra else []
            for occurrence, group in [*((o, samples) for o in range(whole)), (whole, lots[:extra])]:
                draws += [self._draw(sample, epoch, occurrence) for sample in group]
        return draws

    def _draw(self, sample: Sample, epoch: int, occurrence: int) -> Draw:
        caption = choose(len(sample.embed_keys), self.seed, "caption", epoch, sample.id, occurrence)
        return Draw(sample, epoch, occurrence, sample.embed_keys[caption])


def require_enough(
    samples: Sequence[Sample],
    passes: Mapping[str, float],
    batch_size: int,
    num_processes: int,
    accumulation: int,
) -> None:
    """Raise StageError when one epoch does not fill one optimizer step, naming the numbers and the `repeats` that would do.

    Counted over all datasets together, since they share their batches.
    """
    if not samples:
        raise StageError(
            "there is no picture to train on: the datasets' aspect_buckets have no row of the split 'train'"
        )
    counts = Counter(sample.dataset_id for sample in samples)
    have = sum(math.floor(count * passes[dataset_id]) for dataset_id, count in counts.items())
    need = batch_size * num_processes * accumulation
    if have >= need:
        return
    largest, count = counts.most_common(1)[0]
    repeats = math.ceil(passes[largest] - 1 + (need - have) / count)
    raise StageError(
        f"the datasets give {have} pictures an epoch, but one step takes {need}: train_batch_size {batch_size} x "
        f'{num_processes} processes x gradient_accumulation_steps {accumulation}. Set "repeats": {repeats} for dataset '
        f"{largest!r} in the data backend file, or lower one of the three"
    )
