"""Latent keys: dependence on every input that affects the values, stability across versions, and equality of the two implementations."""

import pandas as pd
import pytest

from sdxl_pipeline.cache.encode.cache_keys import latent_key, latent_keys

ROW = {
    "path": "a.png",
    "key": "0f" * 32,
    "crop_index": 0,
    "bucket_h": 256,
    "bucket_w": 320,
    "resized_h": 256,
    "resized_w": 411,
    "crop_top": 0,
    "crop_left": 45,
    "original_h": 500,
    "original_w": 803,
    "source_h": 500,
    "source_w": 803,
    "flipped": False,
    "split": "train",
}


def make_keys(*rows: dict, vae: str = "ab" * 32, dtype: str = "bf16") -> list[str]:
    return latent_keys(pd.DataFrame(list(rows)), vae, dtype)


def test_latent_keys_match_golden_digest():
    assert make_keys(ROW) == ["6c452cd20c22c0401155f24d62af29e987c938f5d30d099211ad6022b79529a6"]


def test_latent_keys_equal_latent_key_of_each_row():
    rows = pd.DataFrame(
        [
            ROW | {"key": f"{n:064x}", "crop_left": n, "crop_top": n % 7, "flipped": n % 3 == 0}
            for n in range(200)
        ]
        + [ROW | {"key": 'not hex: "é%s\\'}]
    )
    for vae, dtype in (("ab" * 32, "bf16"), ('100 % "odd"', "fp32")):
        by_row = [latent_key(row, vae, dtype) for row in rows.itertuples()]
        assert latent_keys(rows, vae, dtype) == by_row
        assert len(set(by_row)) == 201
    assert latent_keys(rows.iloc[:0], "vae", "bf16") == []


@pytest.mark.parametrize(
    "change",
    [
        {"key": "1f" * 32},
        {"bucket_h": 320},
        {"bucket_w": 256},
        {"resized_h": 257},
        {"resized_w": 412},
        {"crop_top": 1},
        {"crop_left": 46},
        {"flipped": True},
    ],
)
def test_latent_keys_change_with_the_pixels(change):
    assert make_keys(ROW | change) != make_keys(ROW)


def test_latent_keys_change_with_the_encoder():
    assert len({*make_keys(ROW), *make_keys(ROW, vae="cd" * 32), *make_keys(ROW, dtype="fp32")}) == 3


def test_latent_keys_ignore_path_crop_index_and_split():
    other = {"path": "moved/b.png", "crop_index": 3, "split": "eval"}
    assert make_keys(ROW | other) == make_keys(ROW)
