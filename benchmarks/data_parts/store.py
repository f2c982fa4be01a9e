"""The tensor store: random batches from page cache, fixed cost of a batch, bytes on disk, and a million entries."""

import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measurements import Measurement, Options
from sdxl_pipeline.cache.store.tensor_store import TensorStore

BATCH = 8
LATENTS = {"mean": (4, 128, 128), "logvar": (4, 128, 128)}
TEXT = {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)}
SMALL_LATENTS = {"mean": (4, 32, 32), "logvar": (4, 32, 32)}

# Writes an index with the given number of entries, or opens the store in a process of its own; prints seconds and bytes as JSON.
OPENING = """
import json, os, sys, time
import numpy as np
import pyarrow.parquet
from sdxl_pipeline.cache.store.store_index import index_of_shard, merged, unpack_keys, write_index
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from pathlib import Path

root, count, make = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "make"
rows = 128
if make:
    rng = np.random.default_rng(0)
    (root / "shards").mkdir(parents=True)
    parts = []
    for number in range(0, count, rows):
        name = f"{number:016x}-1234-abcdef01.safetensors"
        with open(root / "shards" / name, "wb") as file:
            file.truncate(33_562_832)
        keys = np.frombuffer(rng.bytes(32 * rows), "S32")
        parts.append(index_of_shard(name, 33_562_832, keys, np.full(rows, 262_144)))
    write_index(root / "index.parquet", merged(parts))
    sys.exit()
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def peak():
    # not ru_maxrss, which a child inherits
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = memory()
started = time.perf_counter()
store = TensorStore(root)
seconds = time.perf_counter() - started
held, highest = memory() - before, peak() - before
keys = unpack_keys(store._indices[0].keys)
np.random.default_rng(1).shuffle(keys)
started = time.perf_counter()
assert not store.missing(keys)
print(json.dumps({"seconds": seconds, "held": held, "peak": highest, "missing": time.perf_counter() - started, "entries": len(store)}))
"""


def measure(options: Options) -> list[Measurement]:
    """Return the store's measurements. Data is in a temporary folder below the work folder."""
    Path(options.workdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-", dir=options.workdir) as folder:
        root = Path(folder)
        entries = 64 if options.quick else 2048
        measurements = []
        for name, shapes in [("latents", LATENTS), ("text embeddings", TEXT)]:
            measurements += _reading(root / name, name, shapes, entries, options.repeats)
        measurements.append(_fixed_cost(root / "tiny", options.repeats))
        for name, shapes in [
            ("1024 px latents", LATENTS),
            ("text embeddings", TEXT),
            ("256 px latents", SMALL_LATENTS),
        ]:
            measurements.append(_disk(root / f"{name} on disk", name, shapes, 64 if options.quick else 512))
        measurements += _opening(root / "opening", 10_000 if options.quick else 1_000_000)
        return measurements


def _fill(root: Path, shapes: dict[str, tuple[int, ...]], count: int) -> tuple[TensorStore, list[str]]:
    generator = torch.Generator().manual_seed(0)
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    store = TensorStore(root)
    with store.writer() as writer:
        for key in keys:
            writer.add(
                key,
                {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()},
            )
    return TensorStore(root), keys


def _reading(
    root: Path, name: str, shapes: dict[str, tuple[int, ...]], count: int, repeats: int
) -> list[Measurement]:
    store, keys = _fill(root, shapes, count)
    rng = random.Random(0)
    order = [rng.sample(keys, BATCH) for _ in range(count // BATCH)]
    batch_bytes = store.entry_nbytes(keys) // count * BATCH
    in_memory = {key: {n: t.clone() for n, t in store.read(key).items()} for key in keys}
    bare = [
        [in_memory[key] for key in batch] for batch in order
    ]  # looked up in advance: only the stacking is timed

    def read(which: TensorStore) -> None:
        for batch in order:
            which.read_batch(batch)

    def stack() -> None:
        for batch in bare:
            for name_of_tensor in shapes:
                torch.stack([entry[name_of_tensor] for entry in batch])

    first = _seconds(lambda: read(TensorStore(root)), repeats)
    again = _seconds(lambda: read(store), repeats)
    stacking = _seconds(stack, repeats)
    rate = batch_bytes * len(order) / first / 1e9
    overhead = (again - stacking) / len(order) * 1e6
    return [
        Measurement(
            "store",
            f"{name}, random batches of {BATCH}",
            rate,
            "GB/s",
            "at least 1",
            rate >= 1,
            f"from page cache, opening the store and its shards included; {batch_bytes / 1e6:.2f} MB a batch",
        ),
        Measurement(
            "store",
            f"{name}, shards already mapped",
            batch_bytes * len(order) / again / 1e9,
            "GB/s",
            note=f"torch.stack of the same tensors in memory: {batch_bytes * len(order) / stacking / 1e9:.3g} GB/s",
        ),
        Measurement(
            "store",
            f"{name}, first read of a batch of {BATCH} beyond a later one",
            (first - again) / len(order) * 1e3,
            "ms",
            note="opens the store, maps the shards and verifies the checksum of each entry",
        ),
        Measurement(
            "store",
            f"{name}, batch of {BATCH} beyond torch.stack",
            overhead,
            "us",
            note="negative: faster than stacking tensors that are in memory",
        ),
    ]


def _fixed_cost(root: Path, repeats: int) -> Measurement:
    """Return the cost of a batch that does not depend on its size, measured on tiny entries."""
    store, keys = _fill(root, {"mean": (2,), "logvar": (2,)}, 512)
    rng = random.Random(0)
    order = [rng.sample(keys, BATCH) for _ in range(500)]
    entries = [[{n: t.clone() for n, t in store.read(key).items()} for key in batch] for batch in order]

    def stack() -> None:
        for batch in entries:
            for name in ("mean", "logvar"):
                torch.stack([entry[name] for entry in batch])

    def read() -> None:
        for batch in order:
            store.read_batch(batch)

    stacking, reading = (_seconds(work, repeats) / len(order) * 1e6 for work in (stack, read))
    return Measurement(
        "store",
        f"fixed cost of a batch of {BATCH}",
        reading - stacking,
        "us",
        note=f"beyond the {stacking:.3g} us of a bare torch.stack of the same tensors in memory",
    )


def _disk(root: Path, name: str, shapes: dict[str, tuple[int, ...]], count: int) -> Measurement:
    store, keys = _fill(root, shapes, count)
    used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    ratio = used / store.entry_nbytes(keys)
    return Measurement(
        "store",
        f"bytes on disk, {name}",
        ratio,
        "of the tensors'",
        "at most 1.02",
        ratio <= 1.02,
        "shards and index",
    )


def _opening(root: Path, count: int) -> list[Measurement]:
    command = [sys.executable, "-c", OPENING, str(root), str(count)]
    subprocess.run([*command, "make"], check=True)
    seen = [
        json.loads(subprocess.run([*command, "open"], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    middle = {key: statistics.median(run[key] for run in seen) for key in seen[0]}
    entries = f"{int(middle['entries']):,} entries"
    return [
        Measurement(
            "store",
            f"opening, {entries}",
            middle["seconds"],
            "s",
            "about 1",
            middle["seconds"] <= 1.2,
            f"in {-(-count // 128):,} shards",
        ),
        Measurement(
            "store",
            f"memory for {entries}",
            middle["held"] / 1e6,
            "MB",
            "below 300",
            middle["peak"] < 300e6,
            f"{middle['peak'] / 1e6:.0f} MB at most while opening",
        ),
        Measurement(
            "store",
            f"which of {entries} are missing",
            middle["missing"],
            "s",
            note="all keys in one call, in random order",
        ),
    ]


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a call, after one warm-up call."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
