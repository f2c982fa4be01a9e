"""Holds that the demo's dataset is whole, captioned, reproducible, made once, and never overwrites a user's files."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from sdxl_pipeline.demo.demo_dataset import (
    SEEN_COLORS,
    UNSEEN_COLORS,
    DemoRequest,
    ensure_demo_dataset,
    generate_if_asked,
)

SMALL = DemoRequest(images=10, eval_images=4, prior_images=5)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder`."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_same_request_gives_the_same_files(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "a", SMALL)
    ensure_demo_dataset(tmp_path / "b", SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    ensure_demo_dataset(tmp_path / "c", DemoRequest(10, 4, 5, seed=8))
    assert digests(tmp_path / "c") != digests(tmp_path / "a")


def test_it_is_made_once_and_leaves_nothing_beside(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data", SMALL)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")}
    ensure_demo_dataset(tmp_path / "data", SMALL)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*")} == times
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", ".data.lock"}


def test_processes_that_ask_at_once_get_one_whole_dataset(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(ensure_demo_dataset, [tmp_path / "data"] * 3, [SMALL] * 3))
    ensure_demo_dataset(tmp_path / "alone", SMALL)
    assert digests(tmp_path / "data") == digests(tmp_path / "alone")


def test_another_request_replaces_what_was_generated(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data", SMALL)
    ensure_demo_dataset(tmp_path / "data", DemoRequest(images=3, eval_images=2, prior_images=0))
    assert len(list((tmp_path / "data" / "zorp").glob("*.png"))) == 3


def test_a_folder_we_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="was not made by the demo's generator"):
        ensure_demo_dataset(tmp_path / "data", SMALL)
    assert (tmp_path / "data" / "holiday.jpg").read_bytes() == b"mine"


def test_every_image_has_a_caption_and_the_colours_are_split(tmp_path: Path) -> None:
    ensure_demo_dataset(tmp_path / "data")
    zorps = sorted((tmp_path / "data" / "zorp").glob("*.png"))
    unseen = sorted((tmp_path / "data" / "zorp_unseen").glob("*.png"))
    assert 24 <= len(zorps) <= 48
    for image in (*zorps, *unseen):
        caption = image.with_suffix(".txt").read_text().strip()
        colors = SEEN_COLORS if image in zorps else UNSEEN_COLORS
        assert any(f"{color} zorp" in caption for color in colors)
    assert all("zorp" not in file.read_text() for file in (tmp_path / "data" / "world").glob("*.txt"))
    aspects = {round(width / height, 2) for width, height in (Image.open(image).size for image in zorps)}
    assert len(aspects) >= 3


def test_nothing_is_generated_unless_the_project_asks(tmp_path: Path) -> None:
    assert generate_if_asked(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    request = {"generator": "zorp", "images": 4, "eval_images": 2, "prior_images": 2}
    (tmp_path / "generate_data.json").write_text(json.dumps(request))
    assert generate_if_asked(tmp_path) == tmp_path / "data"
    assert len(list((tmp_path / "data").rglob("*.png"))) == 8


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ('{"generator": "dragon"}', "\"generator\" is 'dragon'"),
        ('{"generator": "zorp", "imags": 3}', "'imags' is unknown"),
        ('{"generator": "zorp", "images": "many"}', "'images' is 'many'"),
    ],
)
def test_a_request_the_generator_does_not_know_names_file_key_and_value(
    tmp_path: Path, request_text: str, message: str
) -> None:
    (tmp_path / "generate_data.json").write_text(request_text)
    with pytest.raises(ValueError, match=message) as error:
        generate_if_asked(tmp_path)
    assert "generate_data.json" in str(error.value)
