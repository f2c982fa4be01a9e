"""Holds how crops are put into batches, and batches dealt out: by bucket, by content, evenly by cost, every one once."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from sdxl_pipeline.cache.encode.crop_batches import crop_batches, crop_costs, own_share


def crops(count: int = 30, seed: int = 0) -> pd.DataFrame:
    chance = np.random.default_rng(seed)
    square = chance.random(count) < 0.5
    return pd.DataFrame(
        {
            "path": [f"{index}.png" for index in range(count)],
            "key": [f"{index // 2:04x}" for index in chance.permutation(count)],
            "bucket_h": np.where(square, 64, 32),
            "bucket_w": np.where(square, 64, 128),
            "original_h": chance.integers(64, 4000, count),
            "original_w": chance.integers(64, 4000, count),
            "latent_key": [f"{index:032x}" for index in chance.permutation(count)],
        }
    )


def test_every_wanted_crop_is_in_one_batch_of_its_bucket():
    table = crops()
    wanted = np.random.default_rng(1).random(len(table)) < 0.7
    batches = crop_batches(table, wanted, 4)
    assert sorted(np.concatenate(batches)) == np.flatnonzero(wanted).tolist()
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len(table.iloc[batch][["bucket_h", "bucket_w"]].drop_duplicates()) == 1
    short = [batch for batch in batches if len(batch) < 4]
    assert len(short) <= 2, "at most the last of each bucket"


def test_names_and_order_of_the_files_decide_nothing():
    table = crops()
    shuffled = table.sample(frac=1, random_state=3).assign(path="elsewhere.png")
    everything = np.ones(len(table), bool)

    def contents(frame: pd.DataFrame) -> list[list[str]]:
        return [frame["latent_key"].iloc[batch].tolist() for batch in crop_batches(frame, everything, 4)]

    assert contents(table) == contents(shuffled)


def test_crops_of_one_image_stand_together():
    table = crops(40)
    order = table.iloc[np.concatenate(crop_batches(table, np.ones(40, bool), 8))]
    bucket_and_key = list(zip(order["bucket_h"], order["key"], strict=True))
    changes = 1 + sum(one != other for one, other in pairwise(bucket_and_key))
    assert changes == len(set(bucket_and_key))


def test_a_latent_key_that_stands_twice_is_encoded_once():
    table = pd.concat([crops(), crops()], ignore_index=True)
    rows = np.concatenate(crop_batches(table, np.ones(60, bool), 4))
    assert len(rows) == table["latent_key"].nunique() == 30
    assert rows.max() < 30, "the first row of each"


def test_nothing_wanted_is_no_batch():
    assert crop_batches(crops(), np.zeros(30, bool), 4) == []
    assert crop_batches(crops(0), np.zeros(0, bool), 4) == []


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_even_by_cost_and_cover_everything(count: int):
    costs = [int(cost) for cost in 10 ** np.random.default_rng(0).uniform(3, 7, 200)]
    shares = [own_share(costs, rank, count) for rank in range(count)]
    assert sorted(batch for share in shares for batch in share) == list(range(200))
    loads = [sum(costs[batch] for batch in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert max(loads) <= 1.05 * sum(costs) / count
    assert all(share == sorted(share) for share in shares)


def test_one_huge_image_is_weighed_against_many_small_ones():
    costs = [100, 1, 1, 1, 1, 1]
    assert own_share(costs, 0, 2) == [0]
    assert own_share(costs, 1, 2) == [1, 2, 3, 4, 5]


def test_costs_count_what_is_decoded_and_what_is_encoded():
    table = pd.DataFrame(
        {"original_h": [100], "original_w": [200], "bucket_h": [64], "bucket_w": [32], "path": ["a"]}
    )
    assert crop_costs(table).tolist() == [100 * 200 + 64 * 32]
