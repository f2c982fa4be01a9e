"""Holds what becomes of a store when its disk is full: on a small file system of its own, which really is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, hashlib, os, sys, torch
from sdxl_pipeline.store.tensor_store import StoreError, TensorStore

root = sys.argv[1]
# In a mount namespace of this process's own, which ends with it.
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, (1 << 14) | (1 << 18)
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None) or libc.mount(
    b"tmpfs", root.encode(), b"tmpfs", 0, b"size=2m"
):
    print("cannot mount:", os.strerror(ctypes.get_errno()))
    sys.exit(77)

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
except StoreError as error:
    print(error)
else:
    sys.exit("no error")
store = TensorStore(root)
kept = [number for number in range(20) if key(number) in store]
assert kept == list(range(len(kept))) and 6 <= len(kept) <= 10, kept
assert all(bool((store.read(key(n))["mean"] == n).all()) for n in kept)
assert not hidden(), hidden()
assert len(os.listdir(os.path.join(root, "shards"))) == len(kept) // 2

# not even room for an index: what was written is still read
with open(os.path.join(root, "ballast"), "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass
try:
    write([100, 101])
except StoreError as error:
    assert "no space left" in str(error)
assert len(TensorStore(root)) == len(kept)
assert not hidden(), hidden()
os.unlink(os.path.join(root, "ballast"))

libc.mount(b"tmpfs", root.encode(), b"tmpfs", 1 << 5, b"size=20m")  # remounted larger
write(range(20))
store = TensorStore(root)
assert all(bool((store.read(key(n))["mean"] == n).all()) for n in range(20))
assert not os.listdir(os.path.join(root, "index"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_told_keeps_what_was_written_and_the_next_run_goes_on(tmp_path: Path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--mount", *command]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        pytest.skip("neither root nor `unshare` to mount a tmpfs with")
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {run.stdout}{run.stderr}")
    assert run.returncode == 0, run.stderr
    assert f"no space left on {tmp_path}: 0.4 MB needed for the next 2 entries" in run.stdout
    assert "cache_dir_vae" in run.stdout
