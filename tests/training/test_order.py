"""The order of samples: a pure function of seed, epoch, step and rank, in batches of one bucket, that starves nobody."""

from collections import Counter

import pytest

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.training.order import SampleOrder, passes_per_epoch, require_enough
from sdxl_pipeline.training.samples import Sample
from tests.training.lanes import SQUARE, WIDE, make_lane


def make_samples(count: int, dataset_id="d", bucket=SQUARE, captions=1, first=0) -> list[Sample]:
    return [
        Sample(
            dataset_id=dataset_id,
            path=f"{first + index:03d}.png",
            crop_index=0,
            key=f"key {dataset_id} {first + index}",
            latent_key=f"latent {index}",
            embed_keys=tuple(f"caption {number}" for number in range(captions)),
            bucket=bucket,
            original_size=bucket,
            crop_top_left=(0, 0),
        )
        for index in range(count)
    ]


MIXED = [*make_samples(10), *make_samples(5, bucket=WIDE, first=10)]


def order_of(samples, passes=1.0, seed=3, batch_size=2, num_processes=1) -> SampleOrder:
    datasets = {sample.dataset_id for sample in samples}
    given = passes if isinstance(passes, dict) else dict.fromkeys(datasets, passes)
    return SampleOrder(samples, given, seed, batch_size, num_processes)


def ids(draws) -> list[str]:
    return [draw.sample.id for draw in draws]


def test_any_batch_can_be_asked_for_first():
    straight = order_of(MIXED)
    expected = [straight.batch(index, 0) for index in range(40)]
    for index in (39, 0, 17, 8, 7):
        assert order_of(MIXED).batch(index, 0) == expected[index]
    assert [order_of(MIXED, seed=4).batch(index, 0) for index in range(40)] != expected


def test_epochs_differ_and_each_shows_every_picture():
    order = order_of(MIXED)
    first, second = order.epoch(0), order.epoch(1)
    assert first != second
    for epoch in (first, second):
        assert {name for batch in epoch for name in ids(batch)} == {sample.id for sample in MIXED}
        assert len(epoch) == 5 + 3
    assert order.locate(8) == (1, 0)
    assert order.batches_until(3) == 24


def test_a_batch_is_of_one_bucket():
    order = order_of(MIXED, batch_size=4)
    for index in range(50):
        assert len({draw.sample.bucket for draw in order.batch(index, 0)}) == 1


def test_a_short_bucket_wraps_around_and_is_reported():
    order = order_of(MIXED, batch_size=4)
    counts = Counter(name for batch in order.epoch(0) for name in ids(batch))
    assert sum(counts.values()) == 12 + 8
    assert sorted(counts.values()) == [1] * 10 + [2] * 5
    assert order.fillings() == {SQUARE: (10, 2), WIDE: (5, 3)}
    assert order_of(MIXED, batch_size=5).fillings() == {}
    # a bucket with fewer pictures than a batch has places
    tiny = order_of(make_samples(3), batch_size=8).epoch(0)
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
    lanes = [
        make_lane(tmp_path / "a", "a", repeats=1, probability=2.0),
        make_lane(tmp_path / "b", "b", repeats=0, probability=1.0),
        make_lane(tmp_path / "eval", "eval", probability=9.0),
    ]
    samples = [*make_samples(10, "a"), *make_samples(10, "b")]
    passes = passes_per_epoch(lanes, samples)
    assert passes == {"a": 2.0, "b": 0.5}

    order = order_of(samples, passes, batch_size=1)
    seen: Counter[str] = Counter()
    for epoch in range(40):
        counts = Counter(draw.sample.id for batch in order.epoch(epoch) for draw in batch)
        assert all(counts[sample.id] == 2 for sample in samples[:10])
        assert sum(counts[sample.id] for sample in samples[10:]) == 5
        seen += counts
    # the half that takes part is drawn anew each epoch, so that everyone has turns
    assert all(8 <= seen[sample.id] <= 32 for sample in samples[10:])


def test_a_dataset_of_small_probability_is_still_seen():
    samples = [*make_samples(10, "a"), *make_samples(2, "b")]
    epoch = order_of(samples, {"a": 1.0, "b": 0.01}, batch_size=1).epoch(0)
    assert Counter(draw.sample.dataset_id for batch in epoch for draw in batch) == {"a": 10, "b": 1}


def test_captions_take_turns():
    order = order_of(make_samples(4, captions=3), batch_size=1)
    counts = Counter(draw.embed_key for index in range(1200) for draw in order.batch(index, 0))
    assert set(counts) == {"caption 0", "caption 1", "caption 2"}
    assert min(counts.values()) > 330
    assert order.batch(7, 0) == order_of(make_samples(4, captions=3), batch_size=1).batch(7, 0)


def test_too_few_pictures_is_an_error_with_the_repeats_that_would_do():
    samples = make_samples(5)
    require_enough(samples, {"d": 1.0}, batch_size=5, num_processes=1, accumulation=1)
    with pytest.raises(
        StageError,
        match=r"give 5 pictures.*takes 24: train_batch_size 4 x 2 processes x gradient_accumulation_steps 3.*\"repeats\": 4 .*'d'",
    ):
        require_enough(samples, {"d": 1.0}, batch_size=4, num_processes=2, accumulation=3)
    require_enough(samples, {"d": 5.0}, batch_size=4, num_processes=2, accumulation=3)
    with pytest.raises(StageError, match="no picture to train on"):
        require_enough([], {}, 1, 1, 1)
