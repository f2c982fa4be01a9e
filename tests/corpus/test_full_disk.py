"""The encoder on a disk that is really full: a sentence, a sound store, and the next run goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, os, sys
from pathlib import Path

from PIL import Image

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.images.crops import plan_crops
from sdxl_pipeline.store.tensor_store import TensorStore
from tests.corpus.pipeline import dataset_of, encode, scan, spec_of

here, store = Path(sys.argv[1]), Path(sys.argv[1]) / "store"
store.mkdir()
# In a mount namespace of this process's own, which ends with it.
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, (1 << 14) | (1 << 18)
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None) or libc.mount(
    b"tmpfs", str(store).encode(), b"tmpfs", 0, b"size=128k"
):
    print("cannot mount:", os.strerror(ctypes.get_errno()))
    sys.exit(77)

(here / "data").mkdir()
for number in range(24):
    path = here / "data" / f"{number}.png"
    Image.effect_noise((128, 128), 10 + number).save(path)
    path.with_suffix(".txt").write_text(f"noise {number}")
frame = scan(here / "data")
assert (frame["status"] == "kept").all()
dataset = dataset_of(here / "data").model_copy(update={"resolution": 128})
rows, _ = plan_crops(dataset, frame, 0, 0.0, False)
spec = spec_of(here, here / "data", rows, store)

try:
    encode(spec)
except StageError as error:
    print(error)
else:
    sys.exit("no error")
assert not Path(spec.entries_path).exists(), "a stage that failed leaves no list of entries"
kept = len(TensorStore(store))
assert kept < 24, kept
hidden = [name for _, _, names in os.walk(store) for name in names if ".tmp" in name]
assert not hidden, hidden

libc.mount(b"tmpfs", str(store).encode(), b"tmpfs", 1 << 5, b"size=20m")  # remounted larger
cache = encode(spec)
assert (cache.encoded, cache.reused, cache.failed) == (24 - kept, kept, ()), cache
fresh = encode(spec_of(here, here / "data", rows, here / "elsewhere"))
stored, expected = TensorStore(store), TensorStore(here / "elsewhere")
import pandas as pd
for key in pd.read_parquet(spec.entries_path)["latent_key"]:
    assert (stored.read(key)["mean"] - expected.read(key)["mean"]).abs().max() < 1e-4
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_ends_the_stage_with_a_sentence_and_the_next_run_completes_it(tmp_path: Path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--mount", *command]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("neither root nor `unshare` to mount a tmpfs with")
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {run.stdout}{run.stderr}")
    assert run.returncode == 0, run.stderr
    assert f"no space left on {tmp_path / 'store'}" in run.stdout
    assert "cache_dir_vae" in run.stdout
