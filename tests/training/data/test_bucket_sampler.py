"""The order of samples: a pure function of seed, epoch, step and rank, in batches of one bucket, that starves no image and no crop."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd
import pytest

from sdxl_pipeline.config.schema.optimization import BucketFill
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.data.sampling_weights import sampling_weights_per_epoch
from tests.support.training_datasets import SQUARE, WIDE, digest, make_dataset


def rows(
    count: int,
    dataset_id: str = "d",
    buckets: Sequence[tuple[int, int]] = (SQUARE,),
    captions: int = 1,
    first: int = 0,
    crops: int = 1,
) -> pd.DataFrame:
    """`count` images; crop i of each lies in bucket i, round and round."""
    return pd.DataFrame(
        {
            "dataset_id": dataset_id,
            "key": digest(dataset_id, index),
            "copy": 0,
            "crop_index": crop,
            "path": f"{index:03d}.png",
            "latent_key": digest("latent", index, crop),
            "bucket_h": buckets[crop % len(buckets)][0],
            "bucket_w": buckets[crop % len(buckets)][1],
            **dict.fromkeys(("resized_h", "resized_w", "original_h", "original_w"), 96),
            **dict.fromkeys(("source_h", "source_w", "original_height", "original_width"), 96),
            "crop_top": 0,
            "crop_left": 0,
            "flipped": False,
            "embed_keys": " ".join(f"caption_{number}" for number in range(captions)),
        }
        for index in range(first, first + count)
        for crop in range(crops)
    )


def samples_of(*frames: pd.DataFrame) -> Samples:
    return Samples(pd.concat(frames, ignore_index=True))


MIXED = samples_of(rows(10), rows(5, buckets=[WIDE], first=10))


def order_of(
    samples: Samples,
    passes: float | Mapping[str, float] = 1.0,
    seed: int = 3,
    batch_size: int = 2,
    num_processes: int = 1,
    fill: BucketFill = "partial",
) -> BucketBatchSampler:
    given = passes if isinstance(passes, Mapping) else dict.fromkeys(samples.images_by_dataset(), passes)
    return BucketBatchSampler(samples, given, seed, batch_size, num_processes, fill)


def ids(draws: Sequence[SampleRef]) -> list[str]:
    return [draw.sample.id for draw in draws]


def epoch_of(order: BucketBatchSampler, epoch: int) -> list[list[SampleRef]]:
    """All batches of an epoch."""
    return [
        order.batch(index, 0) for index in range(order.batches_until(epoch), order.batches_until(epoch + 1))
    ]


def test_any_batch_can_be_asked_for_first():
    straight = order_of(MIXED)
    expected = [straight.batch(index, 0) for index in range(40)]
    for index in (39, 0, 17, 8, 7):
        assert order_of(MIXED).batch(index, 0) == expected[index]
    assert [order_of(MIXED, seed=4).batch(index, 0) for index in range(40)] != expected


def test_epochs_differ_and_each_shows_every_image():
    order = order_of(MIXED)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert [ids(batch) for batch in first] != [ids(batch) for batch in second]
    for epoch in (first, second):
        assert {name for batch in epoch for name in ids(batch)} == {sample.id for sample in MIXED}
        assert len(epoch) == 5 + 3
    assert order.locate(8) == (1, 0)
    assert order.batches_until(3) == 24


def test_a_batch_is_of_one_bucket():
    order = order_of(MIXED, batch_size=4)
    for index in range(50):
        assert len({draw.sample.bucket for draw in order.batch(index, 0)}) == 1


def test_neighbours_in_a_batch_change_from_epoch_to_epoch():
    order = order_of(samples_of(rows(64)), batch_size=2)
    pairs = Counter(tuple(sorted(ids(batch))) for epoch in range(20) for batch in epoch_of(order, epoch))
    # 640 pairs out of 2016 possible ones: by chance about 550 different ones
    assert 500 < len(pairs) < 600


@pytest.mark.parametrize(("batch_size", "num_processes"), [(4, 1), (2, 2), (1, 4), (8, 3)])
def test_partial_fill_shows_every_image_once_an_epoch_and_leaves_last_batches_smaller(
    batch_size, num_processes
):
    order = order_of(MIXED, batch_size=batch_size, num_processes=num_processes)
    full = batch_size * num_processes
    for epoch in range(3):
        indices = range(order.batches_until(epoch), order.batches_until(epoch + 1))
        batches = [order.draws(index) for index in indices]
        assert Counter(name for batch in batches for name in ids(batch)) == Counter(s.id for s in MIXED)
        assert all(len({draw.sample.bucket for draw in batch}) == 1 for batch in batches)
        expected = [min(full, count - start) for count in (10, 5) for start in range(0, count, full)]
        assert sorted(map(len, batches)) == sorted(expected)
        for index, batch in zip(indices, batches, strict=True):
            parts = [order.batch(index, rank) for rank in range(num_processes)]
            assert list(itertools.chain(*parts)) == batch
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert order.images_until(order.batches_until(3)) == 45
    sizes = [order.size(index) for index in range(12)]
    assert [order.images_until(index) for index in range(13)] == list(itertools.accumulate(sizes, initial=0))
    assert order.appearances() == {"d": (1, 1)}


def test_appearances_count_repeats_and_what_wrapping_adds():
    lonely = samples_of(rows(7), rows(1, buckets=[WIDE], first=7))
    assert order_of(lonely, 2.0, batch_size=4).appearances() == {"d": (2, 2)}
    assert order_of(lonely, batch_size=4, fill="wrap").appearances() == {"d": (1, 4)}
    assert order_of(lonely, 0.5, batch_size=4).appearances() == {"d": (0, 1)}


def test_a_short_bucket_wraps_around_and_is_reported():
    order = order_of(MIXED, batch_size=4, fill="wrap")
    assert order.images_until(order.batches_until(2)) == 40
    counts = Counter(name for batch in epoch_of(order, 0) for name in ids(batch))
    assert sum(counts.values()) == 12 + 8
    assert sorted(counts.values()) == [1] * 10 + [2] * 5
    assert order.unfilled() == {SQUARE: (10, 2), WIDE: (5, 3)}
    assert order_of(MIXED, batch_size=5).unfilled() == {}
    # a bucket with fewer images than a batch has places
    tiny = epoch_of(order_of(samples_of(rows(3)), batch_size=8, fill="wrap"), 0)
    assert [sorted(Counter(ids(batch)).values()) for batch in tiny] == [[2, 3, 3]]


def test_ranks_share_a_global_batch_without_overlap():
    whole = order_of(MIXED, batch_size=4)
    halves = order_of(MIXED, batch_size=2, num_processes=2)
    overlaps = 0
    for index in range(20):
        parts = [halves.batch(index, rank) for rank in range(2)]
        assert parts[0] + parts[1] == whole.batch(index, 0)
        overlaps += bool(set(ids(parts[0])) & set(ids(parts[1])))
    assert overlaps == 0


def test_repeats_and_probability_are_passes(tmp_path):
    datasets = [
        make_dataset(tmp_path / "a", "a", repeats=1, probability=2.0),
        make_dataset(tmp_path / "b", "b", repeats=0, probability=1.0),
        make_dataset(tmp_path / "eval", "eval", probability=9.0),
    ]
    samples = samples_of(rows(10, "a"), rows(10, "b"))
    passes = sampling_weights_per_epoch(datasets, samples)
    assert passes == {"a": 2.0, "b": 0.5}

    order = order_of(samples, passes, batch_size=1)
    seen: Counter[str] = Counter()
    for epoch in range(40):
        counts = Counter(draw.sample.id for batch in epoch_of(order, epoch) for draw in batch)
        assert all(counts[sample.id] == 2 for sample in samples if sample.dataset_id == "a")
        assert sum(counts[sample.id] for sample in samples if sample.dataset_id == "b") == 5
        seen += counts
    assert {seen[sample.id] for sample in samples if sample.dataset_id == "b"} == {20}


@pytest.mark.parametrize("passes", [0.3, 1.7, 2.0, 1 / 3])
def test_everyone_has_as_many_turns_give_or_take_one(passes):
    samples = samples_of(rows(7))
    order = order_of(samples, passes, batch_size=1)
    seen: Counter[str] = Counter()
    for epoch in range(12):
        counts = Counter(draw.sample.id for batch in epoch_of(order, epoch) for draw in batch)
        assert abs(counts.total() - 7 * passes) < 1
        seen += counts
        assert max(seen.values()) - min(seen[sample.id] for sample in samples) <= 1


def test_a_dataset_of_small_probability_is_still_seen():
    samples = samples_of(rows(10, "a"), rows(2, "b"))
    for epoch in range(4):
        batches = epoch_of(order_of(samples, {"a": 1.0, "b": 0.01}, batch_size=1), epoch)
        assert Counter(draw.sample.dataset_id for batch in batches for draw in batch) == {"a": 10, "b": 1}


def test_captions_take_turns():
    samples = samples_of(rows(4, captions=3))
    order = order_of(samples, batch_size=1)
    counts = Counter(draw.embed_key for index in range(1200) for draw in order.batch(index, 0))
    assert set(counts) == {"caption_0", "caption_1", "caption_2"}
    assert min(counts.values()) > 330
    assert order.batch(7, 0) == order_of(samples, batch_size=1).batch(7, 0)


@pytest.mark.parametrize("passes", [1.0, 2.0, 0.75])
def test_the_crops_of_an_image_take_turns(passes):
    samples = samples_of(rows(8, crops=3, buckets=[SQUARE, WIDE]))
    order = order_of(samples, passes, batch_size=2)
    shown: dict[str, list[int]] = defaultdict(list)
    for epoch in range(9):
        draws = {
            (draw.sample.image, draw.occurrence): draw for batch in epoch_of(order, epoch) for draw in batch
        }  # without what fills the last batches
        assert len(draws) == 8 * passes, "an epoch counts images, not crops"
        for draw in sorted(draws.values(), key=lambda draw: draw.occurrence):
            shown[draw.sample.image].append(draw.sample.crop_index)
    for crops in shown.values():
        assert all(len(set(crops[start : start + 3])) == 3 for start in range(len(crops) - 2))
    assert len({crops[0] for crops in shown.values()}) > 1, "not every image begins with the same crop"


def test_batches_are_of_one_bucket_whichever_crop_has_its_turn():
    order = order_of(samples_of(rows(9, crops=2, buckets=[SQUARE, WIDE])), batch_size=2)
    sizes = set()
    for epoch in range(6):
        batches = epoch_of(order, epoch)
        assert all(len({draw.sample.bucket for draw in batch}) == 1 for batch in batches)
        sizes |= {draw.sample.bucket for batch in batches for draw in batch}
        squares = sum(draw.sample.bucket == SQUARE for batch in batches for draw in set(batch))
        assert len(batches) == -(-squares // 2) + -(-(9 - squares) // 2)
    assert sizes == {SQUARE, WIDE}


def test_the_order_of_the_rows_makes_no_difference():
    frame = pd.concat([rows(10), rows(5, "e", first=10)], ignore_index=True)
    straight, turned = order_of(Samples(frame)), order_of(Samples(frame.iloc[::-1]))
    for index in range(20):
        assert straight.batch(index, 0) == turned.batch(index, 0)


def test_epochs_follow_one_another_without_a_gap():
    order = order_of(samples_of(rows(7, crops=2, buckets=[SQUARE, WIDE])), 1.5)
    lengths = [order.batches_in(epoch) for epoch in range(6)]
    starts = list(itertools.accumulate(lengths, initial=0))
    assert [order.batches_until(epoch) for epoch in range(7)] == starts
    assert [order.locate(start) for start in starts[:6]] == [(epoch, 0) for epoch in range(6)]
