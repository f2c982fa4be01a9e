"""Bucket batch sampling: a pure function of seed, epoch, step and rank, in batches of one bucket, without starving images or crops."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest

from sdxl_pipeline.config.schema.optimization import BucketFill
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.data.training_plan import sampling_weights_per_epoch
from tests.support.sample_tables import sample_rows, samples_of
from tests.support.training_datasets import SQUARE, WIDE, make_dataset

MIXED = samples_of(sample_rows(10), sample_rows(5, buckets=[WIDE], first=10))


def make_sampler(
    samples: Samples,
    weights: float | Mapping[str, float] = 1.0,
    seed: int = 3,
    batch_size: int = 2,
    num_processes: int = 1,
    fill: BucketFill = "partial",
) -> BucketBatchSampler:
    by_dataset = (
        weights if isinstance(weights, Mapping) else dict.fromkeys(samples.images_by_dataset(), weights)
    )
    return BucketBatchSampler(samples, by_dataset, seed, batch_size, num_processes, fill)


def ids(refs: Sequence[SampleRef]) -> list[str]:
    return [ref.sample.id for ref in refs]


def epoch_batches(sampler: BucketBatchSampler, epoch: int) -> list[list[SampleRef]]:
    """Return all batches of an epoch."""
    return [
        sampler.batch(index, 0)
        for index in range(sampler.batches_until(epoch), sampler.batches_until(epoch + 1))
    ]


def test_batch_random_access_equals_sequential_access():
    sequential = make_sampler(MIXED)
    expected = [sequential.batch(index, 0) for index in range(40)]
    for index in (39, 0, 17, 8, 7):
        assert make_sampler(MIXED).batch(index, 0) == expected[index]
    assert [make_sampler(MIXED, seed=4).batch(index, 0) for index in range(40)] != expected


def test_batch_each_epoch_contains_every_image_in_another_order():
    sampler = make_sampler(MIXED)
    first, second = epoch_batches(sampler, 0), epoch_batches(sampler, 1)
    assert [ids(batch) for batch in first] != [ids(batch) for batch in second]
    for epoch in (first, second):
        assert {name for batch in epoch for name in ids(batch)} == {sample.id for sample in MIXED}
        assert len(epoch) == 5 + 3
    assert sampler.locate(8) == (1, 0)
    assert sampler.batches_until(3) == 24


def test_batch_contains_one_bucket():
    sampler = make_sampler(MIXED, batch_size=4)
    for index in range(50):
        assert len({ref.sample.bucket for ref in sampler.batch(index, 0)}) == 1


def test_batch_neighbours_change_between_epochs():
    sampler = make_sampler(samples_of(sample_rows(64)), batch_size=2)
    pairs = Counter(
        tuple(sorted(ids(batch))) for epoch in range(20) for batch in epoch_batches(sampler, epoch)
    )
    # 640 of 2016 possible pairs: about 550 distinct ones at random
    assert 500 < len(pairs) < 600


@pytest.mark.parametrize(("batch_size", "num_processes"), [(4, 1), (2, 2), (1, 4), (8, 3)])
def test_batch_partial_fill_contains_every_image_once_in_smaller_last_batches(batch_size, num_processes):
    sampler = make_sampler(MIXED, batch_size=batch_size, num_processes=num_processes)
    full = batch_size * num_processes
    for epoch in range(3):
        indices = range(sampler.batches_until(epoch), sampler.batches_until(epoch + 1))
        batches = [sampler.global_batch(index) for index in indices]
        assert Counter(name for batch in batches for name in ids(batch)) == Counter(s.id for s in MIXED)
        assert all(len({ref.sample.bucket for ref in batch}) == 1 for batch in batches)
        expected = [min(full, count - start) for count in (10, 5) for start in range(0, count, full)]
        assert sorted(map(len, batches)) == sorted(expected)
        for index, batch in zip(indices, batches, strict=True):
            parts = [sampler.batch(index, rank) for rank in range(num_processes)]
            assert list(itertools.chain(*parts)) == batch
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sampler.images_until(sampler.batches_until(3)) == 45
    sizes = [sampler.size(index) for index in range(12)]
    assert [sampler.images_until(index) for index in range(13)] == list(
        itertools.accumulate(sizes, initial=0)
    )
    assert sampler.appearances() == {"d": (1, 1)}


def test_appearances_include_repeats_and_wrapped_images():
    samples = samples_of(sample_rows(7), sample_rows(1, buckets=[WIDE], first=7))
    assert make_sampler(samples, 2.0, batch_size=4).appearances() == {"d": (2, 2)}
    assert make_sampler(samples, batch_size=4, fill="wrap").appearances() == {"d": (1, 4)}
    assert make_sampler(samples, 0.5, batch_size=4).appearances() == {"d": (0, 1)}


def test_batch_wrap_fill_repeats_images_and_reports_the_bucket():
    sampler = make_sampler(MIXED, batch_size=4, fill="wrap")
    assert sampler.images_until(sampler.batches_until(2)) == 40
    counts = Counter(name for batch in epoch_batches(sampler, 0) for name in ids(batch))
    assert sum(counts.values()) == 12 + 8
    assert sorted(counts.values()) == [1] * 10 + [2] * 5
    assert sampler.partial_buckets() == {SQUARE: (10, 2), WIDE: (5, 3)}
    assert make_sampler(MIXED, batch_size=5).partial_buckets() == {}
    # a bucket with fewer images than the batch size
    tiny = epoch_batches(make_sampler(samples_of(sample_rows(3)), batch_size=8, fill="wrap"), 0)
    assert [sorted(Counter(ids(batch)).values()) for batch in tiny] == [[2, 3, 3]]


def test_batch_ranks_partition_the_global_batch():
    one_process = make_sampler(MIXED, batch_size=4)
    two_processes = make_sampler(MIXED, batch_size=2, num_processes=2)
    overlaps = 0
    for index in range(20):
        parts = [two_processes.batch(index, rank) for rank in range(2)]
        assert parts[0] + parts[1] == one_process.batch(index, 0)
        overlaps += bool(set(ids(parts[0])) & set(ids(parts[1])))
    assert overlaps == 0


def test_sampling_weights_from_repeats_and_probability_set_the_appearances(tmp_path):
    datasets = [
        make_dataset(tmp_path / "a", "a", repeats=1, probability=2.0),
        make_dataset(tmp_path / "b", "b", repeats=0, probability=1.0),
        make_dataset(tmp_path / "eval", "eval", probability=9.0),
    ]
    samples = samples_of(sample_rows(10, "a"), sample_rows(10, "b"))
    weights = sampling_weights_per_epoch(datasets, samples)
    assert weights == {"a": 2.0, "b": 0.5}

    sampler = make_sampler(samples, weights, batch_size=1)
    seen: Counter[str] = Counter()
    for epoch in range(40):
        counts = Counter(ref.sample.id for batch in epoch_batches(sampler, epoch) for ref in batch)
        assert all(counts[sample.id] == 2 for sample in samples if sample.dataset_id == "a")
        assert sum(counts[sample.id] for sample in samples if sample.dataset_id == "b") == 5
        seen += counts
    assert {seen[sample.id] for sample in samples if sample.dataset_id == "b"} == {20}


@pytest.mark.parametrize("weight", [0.3, 1.7, 2.0, 1 / 3])
def test_batch_fractional_weight_balances_images_to_within_one(weight):
    samples = samples_of(sample_rows(7))
    sampler = make_sampler(samples, weight, batch_size=1)
    seen: Counter[str] = Counter()
    for epoch in range(12):
        counts = Counter(ref.sample.id for batch in epoch_batches(sampler, epoch) for ref in batch)
        assert abs(counts.total() - 7 * weight) < 1
        seen += counts
        assert max(seen.values()) - min(seen[sample.id] for sample in samples) <= 1


def test_batch_small_probability_contains_the_dataset_once_per_epoch():
    samples = samples_of(sample_rows(10, "a"), sample_rows(2, "b"))
    for epoch in range(4):
        batches = epoch_batches(make_sampler(samples, {"a": 1.0, "b": 0.01}, batch_size=1), epoch)
        assert Counter(ref.sample.dataset_id for batch in batches for ref in batch) == {"a": 10, "b": 1}


def test_batch_several_captions_are_chosen_evenly():
    samples = samples_of(sample_rows(4, captions=3))
    sampler = make_sampler(samples, batch_size=1)
    counts = Counter(ref.embed_key for index in range(1200) for ref in sampler.batch(index, 0))
    assert set(counts) == {"caption_0", "caption_1", "caption_2"}
    assert min(counts.values()) > 330
    assert sampler.batch(7, 0) == make_sampler(samples, batch_size=1).batch(7, 0)


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.75])
def test_batch_crops_of_an_image_alternate(weight):
    samples = samples_of(sample_rows(8, crops=3, buckets=[SQUARE, WIDE]))
    sampler = make_sampler(samples, weight, batch_size=2)
    crops_by_image: dict[str, list[int]] = defaultdict(list)
    for epoch in range(9):
        refs = {
            (ref.sample.image, ref.occurrence): ref
            for batch in epoch_batches(sampler, epoch)
            for ref in batch
        }  # without the repeats that fill the last batches
        assert len(refs) == 8 * weight, "an epoch counts images, not crops"
        for ref in sorted(refs.values(), key=lambda ref: ref.occurrence):
            crops_by_image[ref.sample.image].append(ref.sample.crop_index)
    for crops in crops_by_image.values():
        assert all(len(set(crops[start : start + 3])) == 3 for start in range(len(crops) - 2))
    assert len({crops[0] for crops in crops_by_image.values()}) > 1, "images start with different crops"


def test_batch_crops_in_several_buckets_are_batched_by_bucket():
    sampler = make_sampler(samples_of(sample_rows(9, crops=2, buckets=[SQUARE, WIDE])), batch_size=2)
    sizes = set()
    for epoch in range(6):
        batches = epoch_batches(sampler, epoch)
        assert all(len({ref.sample.bucket for ref in batch}) == 1 for batch in batches)
        sizes |= {ref.sample.bucket for batch in batches for ref in batch}
        squares = sum(ref.sample.bucket == SQUARE for batch in batches for ref in set(batch))
        assert len(batches) == -(-squares // 2) + -(-(9 - squares) // 2)
    assert sizes == {SQUARE, WIDE}


def test_batch_is_independent_of_row_order():
    frame = pd.concat([sample_rows(10), sample_rows(5, "e", first=10)], ignore_index=True)
    original, reversed_rows = make_sampler(Samples(frame)), make_sampler(Samples(frame.iloc[::-1]))
    for index in range(20):
        assert original.batch(index, 0) == reversed_rows.batch(index, 0)


def test_locate_epochs_are_contiguous():
    sampler = make_sampler(samples_of(sample_rows(7, crops=2, buckets=[SQUARE, WIDE])), 1.5)
    lengths = [sampler.batches_in(epoch) for epoch in range(6)]
    starts = list(itertools.accumulate(lengths, initial=0))
    assert [sampler.batches_until(epoch) for epoch in range(7)] == starts
    assert [sampler.locate(start) for start in starts[:6]] == [(epoch, 0) for epoch in range(6)]
