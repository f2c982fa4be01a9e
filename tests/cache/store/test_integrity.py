"""Corruption: a flipped byte in a shard or index is detected at the first read, logged, and costs only the corrupt entries."""

import logging
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.store.compaction import compact
from sdxl_pipeline.cache.store.shards import MappedShard
from sdxl_pipeline.cache.store.store_index import pack_keys
from sdxl_pipeline.cache.store.tensor_store import CorruptEntryError, StorageError, TensorStore
from tests.cache.store.test_reading import assert_batch, digest, entry, fill


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip a bit of a byte like a failing disk: size and modification time stay."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def only_shard(root: Path) -> Path:
    (shard,) = (root / "shards").iterdir()
    return shard


def payload_start(shard: Path) -> int:
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def test_read_of_a_flipped_byte_raises_and_removes_the_entry(tmp_path: Path):
    fill(tmp_path, range(6), shard_rows=6)
    flip(only_shard(tmp_path), -3)  # last row of the last tensor by name: `mean` of the sixth entry
    store = TensorStore(tmp_path)
    assert_batch(store, [0, 1, 2, 3, 4])
    with pytest.raises(
        CorruptEntryError, match=r"does not match its checksum.*encodes these entries only"
    ) as error:
        store.read_batch([digest(number) for number in range(6)])
    assert error.value.keys == (digest(5),)
    for later in (store, TensorStore(tmp_path)):
        assert later.missing([digest(number) for number in range(6)]) == [digest(5)]


def test_checksum_covers_every_bit_of_an_entry(tmp_path: Path):
    fill(tmp_path, [0], shard_rows=1)
    shard = only_shard(tmp_path)
    intact = shard.read_bytes()
    for position in range(payload_start(shard), len(intact), 37):
        flip(shard, position, position % 8)
        assert TensorStore(tmp_path).corrupt_keys() == [digest(0)], position
        shard.write_bytes(intact)
    assert TensorStore(tmp_path).corrupt_keys() == []


def test_flipped_header_byte_never_gives_wrong_tensors(tmp_path: Path):
    """Whatever byte of a header changes, an entry is read as written or not at all."""
    fill(tmp_path, range(2), shard_rows=2)
    shard, index = only_shard(tmp_path), (tmp_path / "index.parquet").read_bytes()
    intact = shard.read_bytes()
    for position in range(0, payload_start(shard), 7):
        shard.write_bytes(intact)
        (tmp_path / "index.parquet").write_bytes(index)
        flip(shard, position, 1)
        store = TensorStore(tmp_path)
        for number in range(2):
            try:
                read = store.read(digest(number))
            except StorageError:
                continue
            assert {name: tensor.tolist() for name, tensor in read.items()} == {
                name: tensor.tolist() for name, tensor in entry(number).items()
            }, position


def test_corrupt_entry_is_rewritten_and_not_restored_from_its_old_shard(tmp_path: Path):
    fill(tmp_path, [0], shard_rows=1)
    flip(only_shard(tmp_path), -1)
    with pytest.raises(CorruptEntryError):
        TensorStore(tmp_path).read(digest(0))
    fill(tmp_path, [1])  # merges the index, and adds shards that are in no index
    assert TensorStore(tmp_path).missing([digest(0)]) == [digest(0)]
    fill(tmp_path, [0])
    assert_batch(TensorStore(tmp_path), [1, 0])


def test_compact_does_not_copy_a_corrupt_entry(tmp_path: Path):
    """A copy would get its own checksum, which the corrupt bytes match."""
    fill(tmp_path, range(8), shard_rows=8)
    flip(only_shard(tmp_path), -1)
    compact(tmp_path, lambda: pack_keys([digest(7), digest(0)]))
    store = TensorStore(tmp_path)
    with pytest.raises(CorruptEntryError):
        store.read(digest(7))
    assert_batch(store, [0])


def test_checksum_is_verified_once_for_each_entry(tmp_path: Path, monkeypatch):
    fill(tmp_path, range(4), shard_rows=4)
    store = TensorStore(tmp_path)
    group_calls: list[int] = []
    original = MappedShard._group
    monkeypatch.setattr(
        MappedShard, "_group", lambda shard, row: group_calls.append(row) or original(shard, row)
    )
    for _ in range(3):
        assert_batch(store, [0, 3])
    assert len(group_calls) == 2 * 3 + 2  # each lookup, and each entry's verification


@pytest.mark.parametrize("part", [False, True])
def test_index_with_any_flipped_byte_loses_no_entry(tmp_path: Path, part: bool, caplog):
    fill(tmp_path, range(5), shard_rows=2)
    path = tmp_path / "index.parquet"
    if part:
        path = path.rename(tmp_path / "index" / "part.parquet")
    intact = path.read_bytes()
    reported = 0
    for position in range(0, len(intact), 11):
        (tmp_path / "index.parquet").unlink(missing_ok=True)
        path.write_bytes(intact)
        flip(path, position, position % 8)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_batch(TensorStore(tmp_path), [4, 0, 2, 1, 3])
        reported += str(path) in caplog.text or "rebuilt" in caplog.text
    assert reported > len(range(0, len(intact), 11)) / 2
    caplog.clear()
    assert_batch(TensorStore(tmp_path), [0, 1])
    assert not caplog.records  # it was rebuilt once, and is intact since


def test_corrupt_keys_include_entries_of_an_overwritten_shard(tmp_path: Path):
    store = fill(tmp_path, range(6), shard_rows=3)
    seen: list[tuple[int, int]] = []
    assert store.corrupt_keys(on_progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (6, 6)
    first = sorted((tmp_path / "shards").iterdir())[0]
    first.write_bytes(b"x" * first.stat().st_size)
    assert sorted(TensorStore(tmp_path).corrupt_keys()) == sorted(digest(number) for number in range(3))
    assert TensorStore(tmp_path).corrupt_keys([digest(4), digest("none")]) == []


def test_shard_without_checksums_is_ignored(tmp_path: Path):
    from safetensors.torch import save_file

    fill(tmp_path, [0])
    shard = only_shard(tmp_path)
    save_file(
        {f"0/{name}": tensor[None] for name, tensor in entry(0).items()}, shard, metadata={"keys": digest(0)}
    )
    (tmp_path / "index.parquet").unlink()
    assert TensorStore(tmp_path).missing([digest(0)]) == [digest(0)]
    assert torch.equal(fill(tmp_path, [0]).read(digest(0))["mean"], entry(0)["mean"])
