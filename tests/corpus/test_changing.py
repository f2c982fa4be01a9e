"""Files that change, disappear or appear while they are read: an entry of one state of the file, or a reason."""

import hashlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cache.encode.cache_keys import latent_keys
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.decoding.pixels import load_crop
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan.dataset_scan import DatasetFolderError, scan_dataset
from sdxl_pipeline.models.components import load_vae
from sdxl_pipeline.models.vae import encode_moments, pixels_from_crops
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.stages import encode_latents
from tests.corpus.cases import NEIGHBOURS, photograph, write_image, write_neighbours
from tests.corpus.pipeline import check_frame, encode, make_dataset, make_spec, scan
from tests.support.photographs import encoded

CHANGING = "moving.png"
STATES = [
    encoded(photograph(), "PNG"),
    encoded(photograph("coins", (128, 64)), "PNG"),
    encoded(photograph("moon", (64, 128)).transpose(Image.Transpose.ROTATE_90), "PNG"),
]
CHANGED_REASON = "changed since the dataset was scanned; materialize the dataset again"


def replace_file(path: Path, data: bytes) -> None:
    """Write a temporary file and rename it."""
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    beside.replace(path)


def overwrite_file(path: Path, data: bytes) -> None:
    """Write in place and in pieces, as most programs do."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 2000):
            file.write(data[start : start + 2000])


@contextmanager
def rewriting(path: Path, write: Callable[[Path, bytes], None]) -> Iterator[None]:
    """Write the states of the file in turn, continuously."""
    stop = threading.Event()

    def run() -> None:
        number = 0
        while not stop.wait(0.0005):
            number += 1
            write(path, STATES[number % len(STATES)])

    writer = threading.Thread(target=run)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_neighbours(tmp_path / "data")
    write_image(tmp_path / "data", CHANGING, STATES[0])
    return tmp_path / "data"


def plan(folder: Path, frame: pd.DataFrame) -> pd.DataFrame:
    rows, _ = plan_crops(make_dataset(folder), frame, 0, (), False)
    return rows


@pytest.mark.parametrize("write", [replace_file, overwrite_file])
def test_scan_changing_file_is_read_in_one_state_or_dropped(data, write):
    sizes = {hashlib.sha256(state).hexdigest(): Image.open(io.BytesIO(state)).size for state in STATES}
    seen = set()
    with rewriting(data / CHANGING, write):
        for _ in range(30):
            frame = scan_dataset(make_dataset(data), data).set_index("path")
            assert set(frame.loc[list(NEIGHBOURS), "status"]) == {"kept"}
            if CHANGING not in frame.index:  # the folder was listed while the file did not exist
                continue
            row = frame.loc[CHANGING]
            seen.add(row["status"])
            if row["status"] == "kept":
                assert (row["width"], row["height"]) == sizes[row["key"]]
                assert row["size"] in map(len, STATES)
            else:
                assert row["reason"] in {
                    "changed while it was read", "vanished during the scan", "truncated", "empty file",
                }  # fmt: skip
    assert "kept" in seen or write is overwrite_file


def test_encode_file_changed_after_the_scan_fails_without_an_entry(data, tmp_path):
    rows = plan(data, scan(data))
    replace_file(data / CHANGING, STATES[1])
    spec = make_spec(tmp_path, data, rows)
    cache = encode(spec)
    assert [(item.name, item.reason) for item in cache.failed] == [(CHANGING, CHANGED_REASON)]
    assert (cache.planned, cache.encoded) == (3, 2)
    keys = dict(
        zip(rows["path"], latent_keys(rows, spec.base_model.vae_digest, spec.hardware.vae_dtype), strict=True)
    )
    store = TensorStore(spec.store_root)
    assert [keys[path] in store for path in (*NEIGHBOURS, CHANGING)] == [True, True, False]
    rows = plan(data, scan(data))
    cache = encode(make_spec(tmp_path, data, rows))
    assert (cache.failed, cache.encoded, cache.reused) == ((), 1, 2)


@pytest.mark.parametrize("write", [replace_file, overwrite_file])
def test_encode_changing_file_latents_match_the_state_of_their_key(data, tmp_path, write):
    """Every state of the file is planned; each encoding reads an arbitrary one."""
    frame = scan(data)
    plans = []
    for state in STATES:
        (data / CHANGING).write_bytes(state)
        plans.append(plan(data, scan(data)).query("path == @CHANGING").iloc[0])
    rows = plan(data, frame)
    neighbours = rows[rows["path"] != CHANGING]
    for attempt in range(4):
        planned = pd.concat([neighbours, plans[attempt % 3].to_frame().T.astype(rows.dtypes.to_dict())])
        spec = make_spec(tmp_path, data, planned)
        with rewriting(data / CHANGING, write):
            cache = encode(spec)
        assert {item.name for item in cache.failed} <= {CHANGING}
    everything = pd.DataFrame(plans).astype(rows.dtypes.to_dict())
    vae, store = load_vae(spec.base_model, torch.float32), TensorStore(spec.store_root)
    keys = latent_keys(everything, spec.base_model.vae_digest, spec.hardware.vae_dtype)
    for state, row, key in zip(STATES, everything.itertuples(index=False), keys, strict=True):
        if key in store:
            mean, _ = encode_moments(vae, pixels_from_crops([load_crop(state, row)]))
            assert (store.read(key)["mean"] - mean[0]).abs().max() < 1e-3


def test_encode_missing_folder_raises_one_message(data, tmp_path):
    spec = make_spec(tmp_path, data, plan(data, scan(data)))
    data.rename(tmp_path / "away")
    with pytest.raises(UserError, match="does not exist; it existed when the dataset was scanned") as error:
        encode(spec)
    assert str(data) in str(error.value)
    assert not Path(spec.entries_path).exists()
    (tmp_path / "away").rename(data)
    assert encode(spec).encoded == 3


def test_encode_missing_subfolder_reports_each_file(data, tmp_path):
    for number in range(3):
        write_image(data, f"part/{number}.png", encoded(photograph().rotate(number + 1), "PNG"))
    rows = plan(data, scan(data))
    shutil.rmtree(data / "part")
    cache = encode(make_spec(tmp_path, data, rows))
    assert sorted(item.name for item in cache.failed) == [f"part/{number}.png" for number in range(3)]
    assert {item.reason for item in cache.failed} == {"cannot be read: No such file or directory"}
    assert cache.encoded == 3


def test_encode_folder_removed_during_encoding_keeps_finished_entries(data, tmp_path):
    for number in range(20):
        write_image(data, f"{number}.png", encoded(photograph().rotate(number + 1), "PNG"))
    spec = make_spec(tmp_path, data, plan(data, scan(data)))

    class FolderRemover(Reporter):
        def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
            if data.exists():
                data.rename(tmp_path / "away")

    with pytest.raises(UserError, match="does not exist"):
        encode_latents.main(spec, FolderRemover(), StopSignal())
    stored = len(TensorStore(spec.store_root))
    assert 4 <= stored < 23
    (tmp_path / "away").rename(data)
    cache = encode(spec)
    assert (cache.encoded, cache.reused, cache.failed) == (23 - stored, stored, ())


def test_scan_and_hash_folder_removed_meanwhile_gives_each_file_a_reason(data, tmp_path):
    for number in range(40):
        write_image(data, f"{number}.png", encoded(photograph().rotate(number + 1), "PNG"))
    away = tmp_path / "away"

    def remove_folder(done: int, total: int) -> None:
        if data.exists():
            data.rename(away)

    frame = scan_dataset(make_dataset(data), data, on_progress=remove_folder)
    images = frame[frame["path"].str.endswith((".png", ".jpg"))]
    assert len(images) == 43
    assert set(images["status"]) <= {"kept", "dropped"}
    assert set(images.loc[images["status"] == "dropped", "reason"]) <= {
        "vanished during the scan", "caption file cannot be read", "no caption file",
    }  # fmt: skip
    with pytest.raises(DatasetFolderError, match="does not exist"):
        scan_dataset(make_dataset(data), data)
    away.rename(data)
    frame = scan_dataset(make_dataset(data), data)
    hashed = compute_hashes(data, frame, tmp_path / "looks.parquet", remove_folder)
    dropped = hashed[hashed["status"] == "dropped"]
    assert set(dropped["reason"]) <= {"cannot be read: No such file or directory"}
    away.rename(data)
    hashed = compute_hashes(data, frame, tmp_path / "looks.parquet")
    assert (hashed["status"] == "kept").all(), "the failed attempt is not recorded"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of another user")
def test_scan_unreadable_files_are_dropped_with_their_reason():
    """Scan as another user, since root can read everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        outcomes = dict(write_neighbours(folder))
        write_image(folder, "secret.png", STATES[0])
        write_image(folder, "silent.png", STATES[1])
        write_image(folder, "closed/inside.png", STATES[2])
        (folder / "secret.png").chmod(0)
        (folder / "silent.txt").chmod(0)
        (folder / "closed").chmod(0)
        Path(name).chmod(0o755)
        try:
            frame = as_nobody(lambda: scan_dataset(make_dataset(folder), folder))
        finally:
            (folder / "closed").chmod(0o755)
    check_frame(
        frame,
        outcomes
        | {
            "secret.png": "cannot be read: Permission denied",
            "silent.png": "caption file cannot be read",
            "closed/": "folder cannot be read: Permission denied",
        },
    )


def as_nobody(work: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return the result of `work` run by a user without permissions if the tests run as root, else by the current user."""
    if os.geteuid() != 0:
        return work()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(work().to_json())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        output = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return pd.read_json(io.StringIO(output), dtype=False)
