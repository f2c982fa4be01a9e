"""A latent's key says everything that its values depend on, and is the same by rows and by columns."""

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


def keys_of(*rows: dict, vae: str = "ab" * 32, dtype: str = "bf16") -> list[str]:
    return latent_keys(pd.DataFrame(list(rows)), vae, dtype)


def test_an_entry_that_was_made_with_this_version_is_found_by_the_next():
    assert keys_of(ROW) == ["6c452cd20c22c0401155f24d62af29e987c938f5d30d099211ad6022b79529a6"]


def test_keys_by_column_are_the_keys_by_row():
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
def test_whatever_changes_the_pixels_changes_the_key(change):
    assert keys_of(ROW | change) != keys_of(ROW)


def test_whatever_changes_the_encoder_changes_the_key():
    assert len({*keys_of(ROW), *keys_of(ROW, vae="cd" * 32), *keys_of(ROW, dtype="fp32")}) == 3


def test_names_numbers_and_sides_do_not():
    other = {"path": "moved/b.png", "crop_index": 3, "split": "eval"}
    assert keys_of(ROW | other) == keys_of(ROW)
