"""Compaction: what is freed, and that concurrent readers and writers lose nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.store import compaction
from sdxl_pipeline.cache.store.store_index import pack_keys, read_index
from sdxl_pipeline.cache.store.tensor_store import StorageError, TensorStore

HEADER = (
    "import hashlib, sys, time, torch\n"
    + """
from sdxl_pipeline.cache.store.compaction import compact
from sdxl_pipeline.cache.store.store_index import pack_keys
from sdxl_pipeline.cache.store.tensor_store import TensorStore

root = sys.argv[1]
key = lambda number: hashlib.sha256(str(number).encode()).hexdigest()
entry = lambda number: {"mean": torch.full((64,), float(number))}
"""
)

# Holds a lease on entries 0..9 until its standard input closes; prints "held" once it does.
HOLDER = (
    HEADER
    + """
store = TensorStore(root)
with store.lease([key(number) for number in range(10)], purpose="train"):
    print("held", flush=True)
    sys.stdin.read()
"""
)

# Writes its own entries and rereads all of them repeatedly under a lease, like an encode stage.
WRITER = (
    HEADER
    + """
first, rounds = int(sys.argv[2]), 12
for number in range(rounds):
    mine = list(range(first, first + 5 * (number + 1)))
    store = TensorStore(root)
    with store.lease([key(n) for n in mine], purpose="encode"):
        with store.writer(shard_rows=3) as writer:
            for n in mine:
                if key(n) not in store:
                    writer.add(key(n), entry(n))
        for n in mine:
            assert (store.read(key(n))["mean"] == n).all(), n
        seen = TensorStore(root)
        batch = seen.read_batch([key(n) for n in mine])
        assert batch["mean"][:, 0].tolist() == [float(n) for n in mine]
"""
)

# Reads random entries of 0..29 through one store until its standard input closes, like a training.
READER = (
    HEADER
    + """
import random, threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
store = TensorStore(root)
random_numbers = random.Random(0)
count = 0
with store.lease([key(n) for n in range(30)], purpose="train"):
    print("reading", flush=True)
    while not ended.is_set():
        numbers = random_numbers.sample(range(30), 8)
        batch = store.read_batch([key(n) for n in numbers])
        assert batch["mean"][:, 0].tolist() == [float(n) for n in numbers]
        store._open.clear()  # else few shards would ever be reopened
        count += 1
        time.sleep(0.002)
print(count)
"""
)


def compact(root: Path, needed, **options) -> compaction.Compaction:
    return compaction.compact(root, lambda: needed, **options)


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def packed(*numbers: int):
    return pack_keys([digest(number) for number in numbers])


def fill(root: Path, numbers, shard_rows: int = 4) -> TensorStore:
    store = TensorStore(root)
    with store.writer(shard_rows) as writer:
        for number in numbers:
            writer.add(digest(number), {"mean": torch.full((64,), float(number))})
    return store


def assert_holds(store: TensorStore, numbers) -> None:
    for number in numbers:
        assert (store.read(digest(number))["mean"] == number).all()


def shards_size(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "shards").iterdir())


def start_process(program: str, root: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(root), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_line(child: subprocess.Popen) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_compact_deletes_unneeded_shards_and_reports_bytes(tmp_path: Path):
    fill(tmp_path, range(12))
    before = shards_size(tmp_path)
    estimated = compact(tmp_path, packed(0, 1, 2, 3), dry_run=True)
    assert shards_size(tmp_path) == before
    done = compact(tmp_path, packed(0, 1, 2, 3))
    assert estimated == done
    assert (done.entries, done.deleted_shards, done.rewritten_shards) == (8, 2, 0)
    assert done.bytes == before - shards_size(tmp_path) > 0
    store = TensorStore(tmp_path)
    assert_holds(store, range(4))
    assert store.missing([digest(number) for number in range(12)]) == [digest(n) for n in range(4, 12)]
    assert compact(tmp_path, packed(0, 1, 2, 3)).bytes == 0
    fill(tmp_path, range(12))
    assert_holds(TensorStore(tmp_path), range(12))


@pytest.mark.parametrize(
    ("needed", "rewritten", "left"),
    [(range(16), 0, 16), (range(13), 0, 16), (range(12), 1, 12), (range(1), 1, 1)],
)
def test_compact_rewrites_a_shard_with_a_quarter_of_unneeded_entries(tmp_path, needed, rewritten, left):
    fill(tmp_path, range(16), shard_rows=16)
    before = shards_size(tmp_path)
    done = compact(tmp_path, packed(*needed))
    assert (done.entries, done.rewritten_shards, done.deleted_shards) == (16 - left, rewritten, 0)
    assert done.bytes == before - shards_size(tmp_path)
    store = TensorStore(tmp_path)
    assert len(store) == left
    assert_holds(store, needed)
    assert compact(tmp_path, packed(*needed)).rewritten_shards == 0


def test_compact_merges_shards_of_several_layouts(tmp_path: Path):
    store = TensorStore(tmp_path)
    with store.writer(shard_rows=4) as writer:
        for number in range(40):
            writer.add(digest(number), {"mean": torch.full((3 + number % 2, 5), float(number))})
    compact(tmp_path, packed(*range(0, 40, 4), *range(1, 40, 4)))
    assert len(list((tmp_path / "shards").iterdir())) == 1
    for seen in (store, TensorStore(tmp_path)):
        for number in [*range(0, 40, 4), *range(1, 40, 4)]:
            mean = seen.read(digest(number))["mean"]
            assert mean.shape == (3 + number % 2, 5)
            assert (mean == number).all()


def test_compact_retains_one_copy_of_a_duplicate_entry(tmp_path: Path):
    early, late = TensorStore(tmp_path), TensorStore(tmp_path)
    for store in (early, late):  # neither has read the other's entries
        with store.writer() as writer:
            for number in range(4):
                writer.add(digest(number), {"mean": torch.full((64,), float(number))})
    assert len(list((tmp_path / "shards").iterdir())) == 2
    for shard in (tmp_path / "shards").iterdir():
        os.utime(shard, (time.time() - 7200,) * 2)
    assert compact(tmp_path, packed(*range(4))).bytes > 0
    assert len(list((tmp_path / "shards").iterdir())) == 1
    for store in (early, late, TensorStore(tmp_path)):
        assert_holds(store, range(4))


def test_reader_finds_entries_of_a_rewritten_shard(tmp_path: Path):
    fill(tmp_path, range(8), shard_rows=8)
    never_opened, opened = TensorStore(tmp_path), TensorStore(tmp_path)
    assert_holds(opened, [0])
    compact(tmp_path, packed(*range(4)))
    for reader in (never_opened, opened):
        assert_holds(reader, range(4))
    with pytest.raises(StorageError, match=digest(7)):
        never_opened.read(digest(7))


def test_lease_protects_entries_until_its_process_dies(tmp_path: Path):
    fill(tmp_path, range(20), shard_rows=2)
    with start_process(HOLDER, tmp_path) as child:
        assert read_line(child) == "held"
        done = compact(tmp_path, packed(15))
        assert done.retained_for == (f"train (process {child.pid} on {os.uname().nodename})",)
        assert_holds(TensorStore(tmp_path), [*range(10), 15])
        assert len(TensorStore(tmp_path)) == 11, "14 was in the shard of 15, which was rewritten"
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
    assert len(list((tmp_path / "leases").iterdir())) == 1, "the dead process's file"
    done = compact(tmp_path, packed(15))
    assert (done.entries, done.retained_for) == (10, ())
    assert list((tmp_path / "leases").iterdir()) == []


def test_lease_ends_with_its_block_on_exception(tmp_path: Path):
    store = fill(tmp_path, range(4))
    with pytest.raises(KeyboardInterrupt), store.lease([digest(0)], purpose="train"):
        raise KeyboardInterrupt
    assert compact(tmp_path, packed()).entries == 4


def test_lease_covers_entries_written_later(tmp_path: Path):
    store = TensorStore(tmp_path)
    with store.lease([digest(number) for number in range(4)], purpose="train"):
        fill(tmp_path, range(8), shard_rows=4)
        assert compact(tmp_path, packed()).entries == 4
        assert_holds(store, range(4))


def test_lease_refreshes_the_index(tmp_path: Path):
    store = fill(tmp_path, range(4))
    compact(tmp_path, packed(0))
    assert store.missing([digest(3)]) == [], "the index of when the store was opened"
    with store.lease([digest(3)], purpose="encode"):
        assert store.missing([digest(3)]) == [digest(3)]


def test_compact_retains_entries_written_since_a_writer_started(tmp_path: Path):
    fill(tmp_path, range(4))
    store = TensorStore(tmp_path)
    with store.writer(shard_rows=2) as writer:
        time.sleep(0.02)  # file times are a few milliseconds coarse
        for number in range(10, 14):
            writer.add(digest(number), {"mean": torch.full((64,), float(number))})
        done = compact(tmp_path, packed())
        assert done.entries == 4
        assert len(done.retained_for) == 1
        assert done.retained_for[0].startswith("writing entries")
        assert_holds(TensorStore(tmp_path), range(10, 14))
    assert compact(tmp_path, packed()).entries == 4


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe", b'{"purpose": "x", "pid": 1}\nshort'])
def test_unreadable_lease_protects_all_entries(tmp_path: Path, content):
    store = fill(tmp_path, range(4))
    with store.lease([digest(0)], purpose="train"):
        (lease,) = (tmp_path / "leases").iterdir()
        lease.write_bytes(content)
        assert compact(tmp_path, packed()).entries == 0
    assert compact(tmp_path, packed()).entries == 4


def test_compact_calls_needed_after_the_leases_and_before_deleting(tmp_path: Path):
    store = fill(tmp_path, range(12))
    references: list[int] = []
    lease = store.lease([digest(number) for number in range(4)], purpose="encode")
    lease.__enter__()

    def needed():
        # The stage releases its lease while the prune runs: it has written its references before.
        if not references:
            references.extend(range(4))
            lease.__exit__(None, None, None)
            return packed()
        return packed(*references)

    assert compaction.compact(tmp_path, needed).entries == 8
    assert_holds(TensorStore(tmp_path), range(4))
    assert compaction.compact(tmp_path, lambda: None).entries == 0


def test_compact_of_an_absent_store_frees_nothing(tmp_path: Path):
    assert compact(tmp_path / "none", packed(1)).bytes == 0
    assert not (tmp_path / "none").exists()


def test_compact_counts_leftovers_of_killed_writers(tmp_path: Path):
    fill(tmp_path, range(4))
    half = tmp_path / "shards" / ".half.1-abc.tmp.safetensors"
    half.write_bytes(b"x" * 1000)
    assert compact(tmp_path, packed(*range(4))).bytes == 0, "it may belong to an active writer"
    os.utime(half, (time.time() - 7200,) * 2)
    assert compact(tmp_path, packed(*range(4)), dry_run=True).bytes == 1000
    assert compact(tmp_path, packed(*range(4))).bytes == 1000
    assert not half.exists()


def test_compact_on_a_full_disk_skips_rewriting_and_loses_nothing(tmp_path: Path, monkeypatch):
    fill(tmp_path, range(12), shard_rows=4)

    def full(path, entries):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr("sdxl_pipeline.cache.store.compaction.write_shard", full)
    done = compact(tmp_path, packed(0, 4))
    assert (done.deleted_shards, done.rewritten_shards) == (1, 0)
    assert_holds(TensorStore(tmp_path), range(8))


@pytest.mark.slow
def test_concurrent_writers_reader_and_prunes_lose_nothing(tmp_path: Path):
    fill(tmp_path, range(30), shard_rows=7)
    reader = start_process(READER, tmp_path)
    assert read_line(reader) == "reading"
    writers = [start_process(WRITER, tmp_path, str(first)) for first in (1000, 2000, 1030)]
    prunes, rewritten, salt = 0, 0, 100
    while any(writer.poll() is None for writer in writers):
        # Some entries of the reader share shards with unneeded entries, so those shards are rewritten.
        fill(tmp_path, range(salt, salt + 5), shard_rows=5)
        done = compact(tmp_path, packed(*range(0, 30, 3)))
        prunes, rewritten, salt = prunes + 1, rewritten + done.rewritten_shards, salt + 5
    assert [(writer.wait(60), writer.communicate()[1]) for writer in writers] == [(0, "")] * 3
    out, errors = reader.communicate(timeout=60)
    assert (reader.returncode, errors) == (0, "")
    assert int(out) > 10
    assert prunes > 3
    store = TensorStore(tmp_path)
    assert_holds(store, range(0, 30, 3))
    compact(tmp_path, packed(*range(0, 30, 3)))
    index = read_index(tmp_path / "index.parquet")
    assert index is not None
    assert sorted(index.shards) == sorted(path.name for path in (tmp_path / "shards").iterdir())


def test_compact_killed_at_any_time_loses_nothing(tmp_path: Path):
    program = (
        HEADER
        + """
import os, signal
from pathlib import Path
import sdxl_pipeline.cache.store.compaction as compaction
from sdxl_pipeline.cache.store.store_folder import StoreFolder

stop = int(sys.argv[2])
calls = 0
def dying(function):
    def called(*arguments, **options):
        global calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return called
compaction.write_shard = dying(compaction.write_shard)
StoreFolder.write_index = dying(StoreFolder.write_index)
StoreFolder.collect_orphans = dying(StoreFolder.collect_orphans)
Path.unlink = dying(Path.unlink)
compact(Path(root), lambda: pack_keys([key(n) for n in range(0, 20, 2)]))
print("over", calls)
"""
    )
    ends = []
    for stop in (1, 4, 7, 10):
        root = tmp_path / str(stop)
        fill(root, range(30), shard_rows=5)
        with start_process(program, root, str(stop)) as child:
            _, errors = child.communicate(timeout=60)
        ends.append(child.returncode)
        assert child.returncode in (0, -signal.SIGKILL), errors
        assert_holds(TensorStore(root), range(0, 20, 2))
        compact(root, packed(*range(0, 20, 2)))
        fill(root, [50])
        assert_holds(TensorStore(root), [*range(0, 20, 2), 50])
    assert ends.count(-signal.SIGKILL) >= 3, "killed while it ran"
