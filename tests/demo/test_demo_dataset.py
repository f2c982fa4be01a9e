"""Tests of the demo dataset: complete, captioned, reproducible, generated once, and never overwriting a user's files."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from sdxl_pipeline.demo.demo_dataset import (
    EVAL_COLORS,
    TRAIN_COLORS,
    DemoRequest,
    ensure_demo_dataset,
    generate_if_requested,
)

SMALL = DemoRequest(images=10, eval_images=4, prior_images=5)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under `folder`."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_ensure_demo_dataset_equal_requests_give_equal_files(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "a", SMALL)
    ensure_demo_dataset(tmp_path / "b", SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    ensure_demo_dataset(tmp_path / "c", DemoRequest(10, 4, 5, seed=8))
    assert digests(tmp_path / "c") != digests(tmp_path / "a")


def test_ensure_demo_dataset_existing_folder_is_unchanged(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data", SMALL)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")}
    ensure_demo_dataset(tmp_path / "data", SMALL)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")} == times
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", ".data.lock"}


def test_ensure_demo_dataset_concurrent_processes_give_one_dataset(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(ensure_demo_dataset, [tmp_path / "data"] * 3, [SMALL] * 3))
    ensure_demo_dataset(tmp_path / "alone", SMALL)
    assert digests(tmp_path / "data") == digests(tmp_path / "alone")


def test_ensure_demo_dataset_other_request_replaces_dataset(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data", SMALL)
    ensure_demo_dataset(tmp_path / "data", DemoRequest(images=3, eval_images=2, prior_images=0))
    assert len(list((tmp_path / "data" / "zorp").glob("*.png"))) == 3


def test_ensure_demo_dataset_foreign_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="was not created by the demo's generator"):
        ensure_demo_dataset(tmp_path / "data", SMALL)
    assert (tmp_path / "data" / "holiday.jpg").read_bytes() == b"mine"


def test_ensure_demo_dataset_images_have_captions_and_split_colours(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data")
    zorps = sorted((tmp_path / "data" / "zorp").glob("*.png"))
    eval_images = sorted((tmp_path / "data" / "zorp_unseen").glob("*.png"))
    assert 24 <= len(zorps) <= 48
    for image in (*zorps, *eval_images):
        caption = image.with_suffix(".txt").read_text().strip()
        colors = TRAIN_COLORS if image in zorps else EVAL_COLORS
        assert any(f"{color} zorp" in caption for color in colors)
    assert all("zorp" not in file.read_text() for file in (tmp_path / "data" / "world").glob("*.txt"))
    aspects = {round(width / height, 2) for width, height in (Image.open(image).size for image in zorps)}
    assert len(aspects) >= 3


def test_generate_if_requested_without_request_file_returns_none(tmp_path: Path) -> None:
    assert generate_if_requested(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    request = {"generator": "zorp", "images": 4, "eval_images": 2, "prior_images": 2}
    (tmp_path / "generate_data.json").write_text(json.dumps(request))
    assert generate_if_requested(tmp_path) == tmp_path / "data"
    assert len(list((tmp_path / "data").rglob("*.png"))) == 8


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ('{"generator": "dragon"}', "\"generator\" is 'dragon'"),
        ('{"generator": "zorp", "imags": 3}', "'imags' is unknown"),
        ('{"generator": "zorp", "images": "many"}', "'images' is 'many'"),
    ],
)
def test_generate_if_requested_invalid_request_raises(
    tmp_path: Path, request_text: str, message: str
) -> None:
    (tmp_path / "generate_data.json").write_text(request_text)
    with pytest.raises(ValueError, match=message) as error:
        generate_if_requested(tmp_path)
    assert "generate_data.json" in str(error.value)
