"""Leases on the cache entries of a stage's datasets: a concurrent prune retains them."""

from pathlib import Path

import pytest

from sdxl_pipeline.cache.store.compaction import compact
from sdxl_pipeline.cache.store.store_index import pack_keys
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.runtime.store_leases import leased_datasets
from tests.support.training_datasets import make_dataset


def entries(*roots: str) -> list[int]:
    return [len(TensorStore(root)) for root in roots]


@pytest.mark.parametrize("mode", ["full", "ondemand", "disable"])
def test_leased_datasets_protect_all_entries_until_the_block_ends(tmp_path: Path, mode):
    datasets = [
        make_dataset(tmp_path / name, name, captions=2).model_copy(
            update={"latent_cache": mode, "text_cache": mode}
        )
        for name in ("first", "second")
    ]
    roots = [
        root for dataset in datasets for root in (dataset.latents.store_root, dataset.text_embeds.store_root)
    ]
    before = entries(*roots)
    assert min(before) > 0
    with leased_datasets(datasets, "train"):
        for root in roots:
            assert compact(Path(root), lambda: pack_keys([])).entries == 0
        assert entries(*roots) == before
    for root in roots:
        compact(Path(root), lambda: pack_keys([]))
    assert entries(*roots) == [0] * 4


def test_leased_datasets_of_a_disabled_cache_create_no_store(tmp_path: Path):
    dataset = make_dataset(tmp_path)
    absent = str(tmp_path / "none")
    dataset = dataset.model_copy(
        update={
            "latent_cache": "disable",
            "latents": dataset.latents.model_copy(
                update={"store_root": absent, "entries_path": f"{absent}.parquet"}
            ),
        }
    )
    with leased_datasets([dataset], "train"):
        assert not Path(absent).exists()
