"""A store on a disk that is really full: a small file system in a mount namespace of its own."""

from pathlib import Path

from tests.support.small_disk import run_on_small_disk

PROGRAM = """
import hashlib, os, sys, torch
from sdxl_pipeline.cache.store.tensor_store import StorageError, TensorStore
from tests.support.small_disk import enlarge_disk, mount_small_disk

root = sys.argv[1]
mount_small_disk(root, "2m")

key = lambda number: hashlib.sha256(str(number).encode()).hexdigest()
entry = lambda number: {"mean": torch.full((50_000,), float(number))}

def write(numbers, ballast=0):
    store = TensorStore(root)
    with store.writer(shard_rows=2) as writer:
        for number in numbers:
            writer.add(key(number), entry(number))

def hidden():
    return [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if ".tmp" in name]

try:
    write(range(20))
except StorageError as error:
    print(error)
else:
    sys.exit("no error")
store = TensorStore(root)
retained = [number for number in range(20) if key(number) in store]
assert retained == list(range(len(retained))) and 6 <= len(retained) <= 10, retained
assert all(bool((store.read(key(n))["mean"] == n).all()) for n in retained)
assert not hidden(), hidden()
assert len(os.listdir(os.path.join(root, "shards"))) == len(retained) // 2

# no space even for an index: written entries remain readable
with open(os.path.join(root, "ballast"), "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass
try:
    write([100, 101])
except StorageError as error:
    assert "no space left" in str(error)
assert len(TensorStore(root)) == len(retained)
assert not hidden(), hidden()
os.unlink(os.path.join(root, "ballast"))

enlarge_disk(root, "20m")
write(range(20))
store = TensorStore(root)
assert all(bool((store.read(key(n))["mean"] == n).all()) for n in range(20))
assert not os.listdir(os.path.join(root, "index"))
"""


def test_writer_on_a_full_disk_raises_and_retains_written_entries(tmp_path: Path):
    output = run_on_small_disk(PROGRAM, tmp_path)
    assert f"no space left on the disk of {tmp_path} for the next 2 entries: 390.6 KiB are needed" in output
    assert "cache_dir_vae" in output
