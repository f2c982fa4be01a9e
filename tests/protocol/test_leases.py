"""Holds that what a stage reads of its lanes stays through a prune."""

from pathlib import Path

import pytest

from sdxl_pipeline.protocol.leases import leased_lanes
from sdxl_pipeline.store.compaction import compact
from sdxl_pipeline.store.index import pack_keys
from sdxl_pipeline.store.tensor_store import TensorStore
from tests.lanes import make_lane


def entries(*roots: str) -> list[int]:
    return [len(TensorStore(root)) for root in roots]


@pytest.mark.parametrize("mode", ["full", "ondemand", "disable"])
def test_all_entries_of_all_lanes_stay_until_the_block_ends(tmp_path: Path, mode):
    lanes = [
        make_lane(tmp_path / name, name, captions=2).model_copy(
            update={"latent_cache": mode, "text_cache": mode}
        )
        for name in ("first", "second")
    ]
    roots = [root for lane in lanes for root in (lane.latents.store_root, lane.text_embeds.store_root)]
    before = entries(*roots)
    assert min(before) > 0
    with leased_lanes(lanes, "train"):
        for root in roots:
            assert compact(Path(root), lambda: pack_keys([])).entries == 0
        assert entries(*roots) == before
    for root in roots:
        compact(Path(root), lambda: pack_keys([]))
    assert entries(*roots) == [0] * 4


def test_a_cache_that_keeps_nothing_makes_no_store(tmp_path: Path):
    lane = make_lane(tmp_path)
    none = str(tmp_path / "none")
    lane = lane.model_copy(
        update={
            "latent_cache": "disable",
            "latents": lane.latents.model_copy(
                update={"store_root": none, "entries_path": f"{none}.parquet"}
            ),
        }
    )
    with leased_lanes([lane], "train"):
        assert not Path(none).exists()
