"""Crop batches and their assignment to processes: by bucket, by content, balanced by cost, without duplicates."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from sdxl_pipeline.cache.encode.crop_batches import batches_of_rank, crop_batches, crop_costs


def make_crops(count: int = 30, seed: int = 0) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    square = generator.random(count) < 0.5
    return pd.DataFrame(
        {
            "path": [f"{index}.png" for index in range(count)],
            "key": [f"{index // 2:04x}" for index in generator.permutation(count)],
            "bucket_h": np.where(square, 64, 32),
            "bucket_w": np.where(square, 64, 128),
            "original_h": generator.integers(64, 4000, count),
            "original_w": generator.integers(64, 4000, count),
            "latent_key": [f"{index:032x}" for index in generator.permutation(count)],
        }
    )


def test_crop_batches_contain_every_selected_crop_once():
    table = make_crops()
    selected = np.random.default_rng(1).random(len(table)) < 0.7
    batches = crop_batches(table, selected, 4)
    assert sorted(np.concatenate(batches)) == np.flatnonzero(selected).tolist()
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len(table.iloc[batch][["bucket_h", "bucket_w"]].drop_duplicates()) == 1
    short = [batch for batch in batches if len(batch) < 4]
    assert len(short) <= 2, "at most the last batch of each bucket"


def test_crop_batches_ignore_paths_and_row_order():
    table = make_crops()
    shuffled = table.sample(frac=1, random_state=3).assign(path="elsewhere.png")
    all_rows = np.ones(len(table), bool)

    def contents(frame: pd.DataFrame) -> list[list[str]]:
        return [frame["latent_key"].iloc[batch].tolist() for batch in crop_batches(frame, all_rows, 4)]

    assert contents(table) == contents(shuffled)


def test_crop_batches_keep_crops_of_one_image_adjacent():
    table = make_crops(40)
    order = table.iloc[np.concatenate(crop_batches(table, np.ones(40, bool), 8))]
    bucket_and_key = list(zip(order["bucket_h"], order["key"], strict=True))
    changes = 1 + sum(one != other for one, other in pairwise(bucket_and_key))
    assert changes == len(set(bucket_and_key))


def test_crop_batches_deduplicate_latent_keys():
    table = pd.concat([make_crops(), make_crops()], ignore_index=True)
    rows = np.concatenate(crop_batches(table, np.ones(60, bool), 4))
    assert len(rows) == table["latent_key"].nunique() == 30
    assert rows.max() < 30, "the first row of each latent key"


def test_crop_batches_of_no_selected_crop_are_empty():
    assert crop_batches(make_crops(), np.zeros(30, bool), 4) == []
    assert crop_batches(make_crops(0), np.zeros(0, bool), 4) == []


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_batches_of_rank_balance_costs_and_cover_all_batches(count: int):
    costs = [int(cost) for cost in 10 ** np.random.default_rng(0).uniform(3, 7, 200)]
    shares = [batches_of_rank(costs, rank, count) for rank in range(count)]
    assert sorted(batch for share in shares for batch in share) == list(range(200))
    loads = [sum(costs[batch] for batch in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert max(loads) <= 1.05 * sum(costs) / count
    assert all(share == sorted(share) for share in shares)


def test_batches_of_rank_balance_one_large_image_against_many_small():
    costs = [100, 1, 1, 1, 1, 1]
    assert batches_of_rank(costs, 0, 2) == [0]
    assert batches_of_rank(costs, 1, 2) == [1, 2, 3, 4, 5]


def test_crop_costs_sum_decoded_and_encoded_pixels():
    table = pd.DataFrame(
        {"original_h": [100], "original_w": [200], "bucket_h": [64], "bucket_w": [32], "path": ["a"]}
    )
    assert crop_costs(table).tolist() == [100 * 200 + 64 * 32]
