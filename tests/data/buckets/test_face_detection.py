"""Tests of face detection, its table of results, and crops centred on faces."""

import hashlib
import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sdxl_pipeline.data.buckets import face_detection
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.buckets.face_detection import FaceDetectorError, find_faces, require_detector
from tests.support.photographs import PHOTOGRAPHS, encoded

needs_opencv = pytest.mark.skipif(find_spec("cv2") is None, reason="the extra `faces` is not installed")


@pytest.fixture
def astronaut() -> Image.Image:
    """512x512; the face is within rows 66 to 163 and columns 177 to 274."""
    with Image.open(PHOTOGRAPHS / "astronaut.png") as image:
        return image.convert("RGB")


def scan_of(folder, **images: Image.Image) -> pd.DataFrame:
    """Save images and return their scan."""
    rows = []
    for name, image in images.items():
        data = encoded(image, "PNG")
        (folder / f"{name}.png").write_bytes(data)
        key = hashlib.sha256(data).hexdigest()
        rows.append((f"{name}.png", key, image.height, image.width, "kept"))
    return pd.DataFrame(rows, columns=["path", "key", "height", "width", "status"])


@needs_opencv
def test_find_faces_large_image_returns_largest_face_in_image_pixels(folder, tmp_path, astronaut):
    with Image.open(PHOTOGRAPHS / "coffee.png") as image:
        coffee = image.convert("RGB")
    large = Image.new("RGB", (3000, 1600), "grey")  # searched at a smaller size
    large.paste(astronaut.resize((256, 256)), (0, 0))
    large.paste(astronaut.resize((1024, 1024)), (1900, 500))
    kept = scan_of(folder, astronaut=astronaut, coffee=coffee, large=large)
    found = find_faces(folder, kept, tmp_path / "faces.parquet").set_index("key")
    small, none, larger = (found.loc[key] for key in kept["key"])
    for box, zoom, down, right in ((small, 1, 0, 0), (larger, 2, 500, 1900)):
        assert abs(box["top"] + box["height"] / 2 - (114 * zoom + down)) < 8 * zoom
        assert abs(box["left"] + box["width"] / 2 - (225 * zoom + right)) < 8 * zoom
        assert abs(box["width"] - 96 * zoom) < 12 * zoom
    assert none.tolist() == [0, 0, 0, 0]


@needs_opencv
def test_find_faces_renamed_image_is_not_searched_again(folder, tmp_path, astronaut, monkeypatch):
    table = tmp_path / "faces.parquet"
    progress = []
    first = find_faces(folder, scan_of(folder, a=astronaut), table, lambda *done: progress.append(done))
    assert progress == [(1, 1)]
    renamed = scan_of(folder, b=astronaut)
    monkeypatch.setattr(face_detection, "largest_face", lambda _: pytest.fail("searched again"))
    pd.testing.assert_frame_equal(find_faces(folder, renamed, table), first)
    monkeypatch.undo()
    # results of another detector version are not reused
    monkeypatch.setattr(face_detection, "DETECTOR", "a better one")
    find_faces(folder, renamed, table, lambda *done: progress.append(done))
    assert progress == [(1, 1)] * 2


@needs_opencv
def test_find_faces_file_edited_since_scan_is_not_recorded(folder, tmp_path, astronaut):
    kept = scan_of(folder, a=astronaut, gone=astronaut.rotate(90))
    (folder / "a.png").write_bytes(encoded(Image.new("RGB", (512, 512)), "PNG"))
    (folder / "gone.png").unlink()
    found = find_faces(folder, kept, tmp_path / "faces.parquet")
    assert found["height"].tolist() == [0, 0]
    scan_of(folder, a=astronaut)
    assert sorted(find_faces(folder, kept, tmp_path / "faces.parquet")["height"] > 0) == [False, True]


@needs_opencv
@pytest.mark.parametrize("turn", [None, Image.Transpose.FLIP_LEFT_RIGHT])
def test_plan_crops_style_face_centres_crop_on_face(folder, tmp_path, make_dataset, astronaut, turn):
    wide = Image.new("RGB", (1600, 512), "grey")
    wide.paste(astronaut, (500, 0))
    wide = wide.transpose(turn) if turn is not None else wide
    kept = scan_of(folder, wide=wide)
    dataset = make_dataset(crop=True, crop_style="face", crops_per_image=4, random_flip=True)
    rows, _ = plan_crops(dataset, kept, 0, (), False, find_faces(folder, kept, tmp_path / "faces.parquet"))
    # all crops around one face are equal, so one and its mirror image remain
    assert sorted(rows["flipped"]) == [False, True]
    for row in rows.itertuples():
        middle = 725 if (turn is None) != row.flipped else 1600 - 725
        assert abs(row.crop_left + 128 - middle / 2) <= 4


def face_frame(*rows: tuple[str, int, int, int, int]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(face_detection.FACE_COLUMNS))


def test_plan_crops_face_near_edge_clips_crop_to_image(make_dataset):
    dataset = make_dataset(crop=True, crop_style="face")
    kept = pd.DataFrame(
        [(name, name, 512, 1024, "kept") for name in ("left", "right", "middle", "none")],
        columns=["path", "key", "height", "width", "status"],
    )
    found = face_frame(("right", 0, 980, 40, 40), ("left", 200, 10, 90, 90), ("middle", 0, 500, 500, 60))
    rows, _ = plan_crops(dataset, kept, 0, (), False, found)
    # resized to 256x512: offsets range from 0 to 256; without a face the window is in the middle
    assert rows["crop_left"].tolist() == [0, 256, 137, 128]
    assert set(rows["crop_top"]) == {0}


def test_require_detector_missing_or_new_opencv_raises_with_hint(make_dataset, monkeypatch):
    dataset = make_dataset(crop=True, crop_style="face")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        FaceDetectorError, match=r"'photos'.*\"crop_style\": \"face\".*sdxl-pipeline\[faces\]"
    ):
        require_detector(dataset)
    opencv_5 = type(np)("cv2")
    opencv_5.__version__ = "5.0.0"
    monkeypatch.setitem(sys.modules, "cv2", opencv_5)
    with pytest.raises(FaceDetectorError, match=r"OpenCV 4; version 5.0.0"):
        require_detector(dataset)
