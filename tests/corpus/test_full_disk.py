"""The encoder on a full disk: one message, a valid store, and a next run that completes it."""

from pathlib import Path

import pytest

from tests.support.small_disk import run_on_small_disk

PROGRAM = """
import os, sys
from pathlib import Path

from PIL import Image

from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from tests.corpus.pipeline import make_dataset, encode, scan, make_spec
from tests.support.small_disk import enlarge_disk, mount_small_disk

here, store = Path(sys.argv[1]), Path(sys.argv[1]) / "store"
store.mkdir()
mount_small_disk(store, "128k")

(here / "data").mkdir()
for number in range(24):
    path = here / "data" / f"{number}.png"
    Image.effect_noise((128, 128), 10 + number).save(path)
    path.with_suffix(".txt").write_text(f"noise {number}")
frame = scan(here / "data")
assert (frame["status"] == "kept").all()
dataset = make_dataset(here / "data").model_copy(update={"resolution": 128})
rows, _ = plan_crops(dataset, frame, 0, (), False)
spec = make_spec(here, here / "data", rows, store)

try:
    encode(spec)
except UserError as error:
    print(error)
else:
    sys.exit("no error")
assert not Path(spec.entries_path).exists(), "a stage that failed leaves no list of entries"
count = len(TensorStore(store))
assert count < 24, count
temporary = [name for _, _, names in os.walk(store) for name in names if ".tmp" in name]
assert not temporary, temporary

enlarge_disk(store, "20m")
cache = encode(spec)
assert (cache.encoded, cache.reused, cache.failed) == (24 - count, count, ()), cache
fresh = encode(make_spec(here, here / "data", rows, here / "elsewhere"))
stored, expected = TensorStore(store), TensorStore(here / "elsewhere")
import pandas as pd
for key in pd.read_parquet(spec.entries_path)["latent_key"]:
    assert (stored.read(key)["mean"] - expected.read(key)["mean"]).abs().max() < 1e-4
"""


@pytest.mark.slow
def test_encode_full_disk_raises_a_message_and_the_next_run_completes_the_store(tmp_path: Path):
    output = run_on_small_disk(PROGRAM, tmp_path)
    assert f"no space left on the disk of {tmp_path / 'store'}" in output
    assert "cache_dir_vae" in output
