"""Reading: row i of a batch is the entry of key i, whatever happened to index and shards meanwhile."""

import dataclasses
import hashlib
import struct
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.store.store_index import (
    index_of_shard,
    merge_indices,
    pack_keys,
    read_index,
    write_index,
)
from sdxl_pipeline.cache.store.tensor_store import StorageError, TensorStore


def digest(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


def entry(number: int, height: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "mean": torch.randn(4, height, 6, generator=generator).bfloat16(),
        "logvar": torch.randn(4, height, 6, generator=generator),
    }


def fill(root: Path, numbers, shard_rows: int = 3, height=lambda number: 8) -> TensorStore:
    store = TensorStore(root)
    with store.writer(shard_rows) as writer:
        for number in numbers:
            writer.add(digest(number), entry(number, height(number)))
    return store


def assert_batch(store: TensorStore, numbers: list[int], height: int = 8) -> None:
    batch = store.read_batch([digest(number) for number in numbers])
    assert set(batch) == {"mean", "logvar"}
    for name, tensor in batch.items():
        assert torch.equal(tensor, torch.stack([entry(number, height)[name] for number in numbers]))


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2], [7, 0, 7, 7, 3], [9, 1, 5]])
def test_read_batch_returns_entries_in_key_order(tmp_path: Path, numbers):
    assert_batch(fill(tmp_path, range(10)), numbers)
    assert_batch(TensorStore(tmp_path), numbers)


def test_read_batch_of_reversed_keys_is_reversed(tmp_path: Path):
    store = fill(tmp_path, range(4))
    keys = [digest(number) for number in range(4)]
    forward, backward = store.read_batch(keys), store.read_batch(keys[::-1])
    assert not torch.equal(forward["mean"], backward["mean"])
    assert torch.equal(forward["mean"], backward["mean"].flip(0))


def test_read_batch_from_shards_of_several_layouts(tmp_path: Path):
    store = fill(tmp_path, range(12), shard_rows=12, height=lambda number: 8 + number % 3)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    for remainder in range(3):
        assert_batch(store, [9 + remainder, remainder, 3 + remainder], height=8 + remainder)


def test_read_batch_of_different_layouts_raises_with_both_keys(tmp_path: Path):
    store = fill(tmp_path, range(2), height=lambda number: 8 + number)
    with pytest.raises(StorageError, match=rf"{digest(0)} and {digest(1)} .*\(4, 8, 6\).*\(4, 9, 6\)"):
        store.read_batch([digest(0), digest(1)])
    with store.writer() as writer:
        writer.add(digest("other"), {"mean": entry(0)["mean"]})
    with pytest.raises(StorageError, match=digest("other")):
        store.read_batch([digest(0), digest("other")])


def test_read_batch_of_an_absent_or_no_key_raises(tmp_path: Path):
    store = fill(tmp_path, range(3))
    with pytest.raises(StorageError, match=digest("none")):
        store.read_batch([digest(0), digest("none"), digest(1)])
    with pytest.raises(StorageError, match="at least one"):
        store.read_batch([])


def test_read_batch_returns_a_copy(tmp_path: Path):
    store = fill(tmp_path, range(3))
    for tensor in store.read_batch([digest(0), digest(1)]).values():
        tensor.zero_()
    assert_batch(store, [0, 1])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_read_restores_any_shape_and_dtype(tmp_path: Path, shape, dtype):
    store = TensorStore(tmp_path)
    tensors = [torch.rand(shape).mul(9).round().to(dtype) for _ in range(3)]
    with store.writer() as writer:
        for number, tensor in enumerate(tensors):
            writer.add(digest(number), {"x": tensor})
    batch = store.read_batch([digest(2), digest(0)])
    assert batch["x"].dtype == dtype
    assert torch.equal(batch["x"], torch.stack([tensors[2], tensors[0]]))
    assert torch.equal(store.read(digest(1))["x"], tensors[1])


def test_index_with_wrong_rows_is_rebuilt_from_the_shards(tmp_path: Path, caplog):
    fill(tmp_path, range(3))
    index = read_index(tmp_path / "index.parquet")
    assert index is not None
    swapped = dataclasses.replace(index, row=index.row[::-1].copy())
    write_index(tmp_path / "index.parquet", swapped)
    assert_batch(TensorStore(tmp_path), [0, 1, 2])
    assert "rebuilt from the shards" in caplog.text
    caplog.clear()
    assert_batch(TensorStore(tmp_path), [2, 1, 0])
    assert not caplog.records


@pytest.mark.parametrize("damage", ["delete", "truncate", "another table", "text"])
def test_lost_or_corrupt_index_is_rebuilt_from_the_shards(tmp_path: Path, damage):
    fill(tmp_path, range(10), height=lambda number: 8 + number % 2)
    path = tmp_path / "index.parquet"
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "text":
        path.write_bytes(b"key,shard\n")
    else:
        import pandas as pd

        pd.DataFrame({"key": ["a"], "shard": ["b"]}).to_parquet(path)
    seen = TensorStore(tmp_path)
    assert len(seen) == 10
    assert_batch(seen, [8, 2, 0])
    assert_batch(seen, [1, 9], height=9)
    fill(tmp_path, [10])
    index = read_index(path)
    assert index is not None
    assert len(index) == 11, "the next writer writes the rebuilt index"


def test_corrupt_index_part_loses_no_entry(tmp_path: Path):
    fill(tmp_path, range(3))
    (tmp_path / "index" / "part.parquet").write_bytes(b"PAR1 and then nothing")
    assert_batch(TensorStore(tmp_path), [2, 0, 1])
    fill(tmp_path, [3])
    assert list((tmp_path / "index").iterdir()) == []
    assert_batch(TensorStore(tmp_path), [3, 2, 0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a shard",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 64) + b'{"0/x":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999]}}   ',
    ],
)
def test_files_that_are_no_shard_are_ignored(tmp_path: Path, content):
    fill(tmp_path, range(3))
    (tmp_path / "shards" / "odd.safetensors").write_bytes(content)
    (tmp_path / "index.parquet").unlink()
    store = TensorStore(tmp_path)
    assert len(store) == 3
    assert_batch(store, [2, 0])


def test_foreign_safetensors_files_are_ignored(tmp_path: Path):
    from safetensors.torch import save_file

    fill(tmp_path, range(3))
    (tmp_path / "index.parquet").unlink()
    x = torch.zeros(2, 3)
    shards = tmp_path / "shards"
    save_file({"0/x": x}, shards / "no-keys.safetensors")
    save_file({"0/x": x}, shards / "too-few.safetensors", metadata={"keys": digest(5)})
    save_file(
        {"0/x": x, "0/y": x[:1].clone()},
        shards / "uneven.safetensors",
        metadata={"keys": digest(5) + digest(6)},
    )
    save_file({"x": x}, shards / "no-group.safetensors", metadata={"keys": digest(5) + digest(6)})
    assert TensorStore(tmp_path).keys() == {digest(number) for number in range(3)}


def test_reader_finds_entries_written_or_moved_since_it_opened_the_store(tmp_path: Path):
    fill(tmp_path, range(3))
    reader = TensorStore(tmp_path)
    (shard,) = (tmp_path / "shards").iterdir()
    shard.unlink()
    fill(tmp_path, range(5))  # rewrites the entries into other shards
    assert_batch(reader, [4, 0, 2])


def test_read_tensors_remain_valid_after_their_shard_is_deleted(tmp_path: Path):
    store = fill(tmp_path, range(3))
    mean = store.read(digest(1))["mean"]
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    assert torch.equal(mean, entry(1)["mean"])
    assert_batch(store, [2, 1])
    with pytest.raises(StorageError, match="Run the stage"):
        TensorStore(tmp_path).read(digest(1))


def test_index_find_distinguishes_keys_of_equal_prefix():
    keys = [f"{number % 7:016x}" + digest(number)[16:] for number in range(500)] + ["00" * 32, "ff" * 32]
    index = merge_indices(
        index_of_shard(
            f"{part}",
            10 + part,
            pack_keys(keys[part::5]),
            pack_keys(keys[part::5]).view("i8")[::4] * 0 + part,
        )
        for part in range(5)
    )
    assert len(index) == len(keys)
    positions = index.find(pack_keys(keys))
    assert (index.keys[positions] == pack_keys(keys)).all()
    assert [index.shards[code] for code in index.shard[positions]] == [str(n % 5) for n in range(len(keys))]
    assert index.row[positions].tolist() == [n // 5 for n in range(len(keys))]
    absent = [f"{number % 9:016x}" + digest(-number)[16:] for number in range(1, 500)]
    assert (index.find(pack_keys(absent)) == -1).all()


def test_index_round_trip_through_its_file(tmp_path: Path):
    keys = sorted(digest(number) for number in range(50))
    index = merge_indices(
        index_of_shard(name, size, pack_keys(some), torch.arange(len(some)).numpy() + size)
        for name, size, some in [("a", 5, keys[::2]), ("b", 7, keys[1::2])]
    )
    write_index(tmp_path / "index.parquet", index)
    again = read_index(tmp_path / "index.parquet")
    assert again is not None
    for column in ("keys", "shard", "row", "nbytes", "shard_bytes", "prefix"):
        assert (getattr(again, column) == getattr(index, column)).all()
    assert again.shards == index.shards
    assert len(again.with_complete_shards({"a": 5, "b": 6})) == 25
    write_index(tmp_path / "empty.parquet", merge_indices([]))
    empty = read_index(tmp_path / "empty.parquet")
    assert empty is not None
    assert empty.find(pack_keys(keys)).tolist() == [-1] * 50
