"""Tensor store: exact round trips, a kill at any time, and concurrent writers."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.store.tensor_store import StorageError, TensorStore

# Adds entries numbered first..last-1 whose tensors hold their number, in shards of 3.
WRITER = """
import hashlib, sys, torch
from sdxl_pipeline.cache.store.tensor_store import TensorStore
root, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = TensorStore(root)
with store.writer(shard_rows=3) as writer:
    for number in range(first, last):
        key = hashlib.sha256(str(number).encode()).hexdigest()
        if key in store.missing([key]):
            writer.add(key, {"mean": torch.full((4, 8, 8), float(number)), "logvar": torch.tensor([number])})
            print(number, flush=True)
"""


def digest(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


NUMBERS = {digest(number): number for number in range(100_000)}


def add(store: TensorStore, *numbers: int, shard_rows: int = 128) -> None:
    with store.writer(shard_rows) as writer:
        for number in numbers:
            writer.add(digest(number), {"mean": torch.full((2, 3), float(number)), "logvar": torch.zeros(5)})


def start_writer(root: Path, first: int, last: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(first), str(last)], stdout=subprocess.PIPE, text=True
    )


def assert_intact(store: TensorStore) -> None:
    for key in sorted(store.keys()):
        entry = store.read(key)
        assert set(entry) == {"mean", "logvar"}
        assert entry["mean"].shape == (4, 8, 8)
        assert (entry["mean"] == NUMBERS[key]).all()
        assert entry["logvar"].tolist() == [NUMBERS[key]]


def test_entries_round_trip_with_dtype_shape_and_bits(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    entries = {
        f"{number:064x}": {
            "mean": torch.randn(4, 5 + number, 7, generator=generator).bfloat16(),
            "logvar": torch.randn(3, generator=generator),
        }
        for number in range(10)
    }
    store = TensorStore(tmp_path)
    with store.writer(shard_rows=4) as writer:
        for key, tensors in entries.items():
            writer.add(key, tensors)
    for seen in (store, TensorStore(tmp_path)):
        assert seen.keys() == entries.keys()
        for key, tensors in entries.items():
            read = seen.read(key)
            assert {name: t.dtype for name, t in read.items()} == {
                "mean": torch.bfloat16,
                "logvar": torch.float32,
            }
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_add_copies_rows_of_a_batch(tmp_path: Path):
    batch = torch.arange(12.0).reshape(3, 4)
    store = TensorStore(tmp_path)
    with store.writer() as writer:
        for row in range(3):
            writer.add(digest(row), {"mean": batch[row], "transposed": batch.T[row]})
        batch.zero_()
    assert store.read(digest(1))["mean"].tolist() == [4, 5, 6, 7]
    assert store.read(digest(1))["transposed"].tolist() == [1, 5, 9]


def test_missing_keeps_order_without_duplicates(tmp_path: Path):
    store = TensorStore(tmp_path)
    add(store, 2, 5)
    assert store.missing([digest(9), digest(2), digest(1), digest(9), digest(5)]) == [digest(9), digest(1)]
    assert digest(2) in store
    assert digest(9) not in store
    assert len(store) == 2


def test_entry_nbytes_counts_each_entry_once(tmp_path: Path):
    store = TensorStore(tmp_path)
    add(store, 1, 2)
    one = (2 * 3 + 5) * 4
    assert store.entry_nbytes([digest(1), digest(2), digest(1)]) == 2 * one


def test_absent_entry_raises_with_its_key(tmp_path: Path):
    store = TensorStore(tmp_path)
    for read_entry in (store.read, lambda key: store.entry_nbytes([key])):
        with pytest.raises(StorageError, match=digest("none")):
            read_entry(digest("none"))


def test_add_of_an_existing_entry_writes_nothing(tmp_path: Path):
    add(TensorStore(tmp_path), 1, 2)
    files = sorted(tmp_path.rglob("*.safetensors"))
    add(TensorStore(tmp_path), 1, 2)
    assert sorted(tmp_path.rglob("*.safetensors")) == files


@pytest.mark.parametrize("key", ["", "a/b", digest(1)[:-1], digest(1)[:-2] + " 0", "x" * 64])
def test_key_that_is_no_digest_raises(tmp_path: Path, key):
    store = TensorStore(tmp_path)
    with store.writer() as writer, pytest.raises(StorageError, match="is not a digest"):
        writer.add(key, {"x": torch.zeros(1)})
    with pytest.raises(StorageError, match="is not a digest"):
        store.read_batch([digest(1), key])


def test_add_without_tensors_raises(tmp_path: Path):
    with TensorStore(tmp_path).writer() as writer, pytest.raises(ValueError, match="no tensors"):
        writer.add(digest(1), {})


def test_writer_retains_entries_added_before_an_exception(tmp_path: Path):
    store = TensorStore(tmp_path)

    def stop_midway() -> None:
        with store.writer() as writer:
            writer.add(digest("before"), {"mean": torch.ones(2)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_midway()
    assert TensorStore(tmp_path).read(digest("before"))["mean"].tolist() == [1, 1]


def test_writer_merges_index_parts(tmp_path: Path):
    store = TensorStore(tmp_path)
    add(store, *range(10), shard_rows=2)
    add(store, *range(10, 12))
    assert list((tmp_path / "index").iterdir()) == []
    assert TensorStore(tmp_path).keys() == {digest(number) for number in range(12)}


def test_read_from_more_shards_than_may_be_open(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sdxl_pipeline.cache.store.tensor_store._OPEN_SHARDS", 3)
    store = TensorStore(tmp_path)
    add(store, *range(10), shard_rows=1)
    for number in [*range(10), 0, 9]:
        assert store.read(digest(number))["mean"][0, 0] == number


def test_refresh_finds_entries_of_another_writer(tmp_path: Path):
    reader = TensorStore(tmp_path)
    add(TensorStore(tmp_path), 1)
    assert reader.missing([digest(1)]) == [digest(1)]
    reader.refresh()
    assert reader.read(digest(1))["mean"].sum() == 6


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_entries_of_a_lost_or_truncated_shard_are_missing_and_rewritable(tmp_path: Path, damage):
    store = TensorStore(tmp_path)
    add(store, 1)
    add(store, 2)
    shard = min((tmp_path / "shards").iterdir())
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    again = TensorStore(tmp_path)
    assert again.missing([digest(1), digest(2)]) == [digest(1)]
    add(again, 1)
    assert TensorStore(tmp_path).read(digest(1))["mean"].sum() == 6


@pytest.mark.parametrize(
    "after", [pytest.param(0, marks=pytest.mark.slow), 4, pytest.param(11, marks=pytest.mark.slow)]
)
def test_killed_writer_leaves_intact_entries_and_a_rerun_completes(tmp_path: Path, after):
    with start_writer(tmp_path, 0, 100_000) as child:
        assert child.stdout is not None
        while child.stdout.readline() != f"{after}\n":
            pass
        os.kill(child.pid, signal.SIGKILL)
    survived = TensorStore(tmp_path)
    assert_intact(survived)
    assert len(survived) >= after // 3 * 3, "shards completed before the kill"

    assert start_writer(tmp_path, 0, len(survived) + 20).wait(60) == 0
    completed = TensorStore(tmp_path)
    assert completed.keys() == {digest(number) for number in range(len(survived) + 20)}
    assert_intact(completed)


def test_concurrent_writers_lose_nothing(tmp_path: Path):
    # the ranges overlap, so both write some entries
    writers = [start_writer(tmp_path, 0, 120), start_writer(tmp_path, 60, 180)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen |= TensorStore(tmp_path).keys()  # concurrent readers never fail
        time.sleep(0.05)
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = TensorStore(tmp_path)
    assert store.keys() == {digest(number) for number in range(180)}
    assert seen <= store.keys()
    assert_intact(store)


def test_old_leftovers_of_killed_writers_are_collected(tmp_path: Path):
    add(TensorStore(tmp_path), 1)
    orphan = tmp_path / "shards" / "orphan.safetensors"
    half = tmp_path / "shards" / ".half.1-abc.tmp.safetensors"
    fresh = tmp_path / "shards" / "fresh.safetensors"
    for path in (orphan, half, fresh):
        path.write_bytes(b"x")
    for path in (orphan, half, *tmp_path.glob("shards/*-*")):
        os.utime(path, (time.time() - 7200,) * 2)
    add(TensorStore(tmp_path), 2)
    assert not orphan.exists()
    assert not half.exists()
    assert fresh.exists()
    assert TensorStore(tmp_path).keys() == {digest(1), digest(2)}
