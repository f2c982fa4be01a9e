"""Where the faces are, for crops that are taken around them: the frontal-face cascade that ships with OpenCV, the optional extra `faces`.

It finds upright faces that look towards the camera, and misses profiles. Of the cascades in the wheel this one took the fewest other
things for faces: none where SimpleTuner's choice, `default`, took the wrong thing for the largest face at 7 of 48 sizes of one
photograph. What is found is kept in a table by the images' content, so each image is searched once in its life.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage, unexpected_as_unreadable
from sdxl_pipeline.data.decoding.pixels import load_upright
from sdxl_pipeline.files.atomic_files import atomic_path, sha256_file

DETECTOR = "haarcascade_frontalface_alt, 4 neighbours, 1024 pixels"
"""What the table's rows were found with; others are searched again. Name a new one when what is found changes."""

FACE_COLUMNS = ("key", "top", "left", "height", "width")
SAVE_SECONDS = 30.0
"""How often the table is written: a kill loses no more work than this."""

_CASCADE = "haarcascade_frontalface_alt.xml"
_LONGEST_EDGE = 1024  # images are searched at this size: a face below 1/20 of the image is not what it shows
_SMALLEST_FACE = 48  # pixels at that size
_NO_FACE = (0, 0, 0, 0)
_BATCH = 256


class FaceDetectorError(Exception):
    """crop_style face was asked for, and OpenCV cannot be had. The message says which setting, and what to install."""


def require_detector(dataset: ImageDataset) -> None:
    """Raise FaceDetectorError when OpenCV is not installed, or is one without the detector."""
    hint = "pip install 'sdxl-pipeline[faces]', or write crop_style random, center or corner"
    setting = f'dataset {dataset.id!r} in multidatabackend.json: "crop_style": "face"'
    try:
        import cv2
    except ImportError as error:
        raise FaceDetectorError(f"{setting} needs OpenCV, which is not installed: {hint}") from error
    if not hasattr(cv2, "CascadeClassifier") or not _cascade_path(cv2).is_file():
        raise FaceDetectorError(
            f"{setting} needs OpenCV 4; version {cv2.__version__} no longer has the face cascades: {hint}"
        )


def find_faces(
    folder: Path,
    kept: pd.DataFrame,
    table: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """The largest face of each image: a row of FACE_COLUMNS per content, in pixels of the upright image; all 0 where there is none.

    `kept` is a scan's frame of images in `folder`. `table` is the Parquet file of what was found before, whose images are not
    read again; it is written by rename, every half minute. `on_progress(done, total)` counts the images that have to be searched.
    An image that is unreadable or changed by now has no face, and is searched again the next time.
    """
    known = _read_table(table)
    wanted = kept[["key", "path"]].drop_duplicates("key")
    missing = wanted[~wanted["key"].isin(known["key"])]
    unreadable: list[tuple[Any, ...]] = []
    saved = time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="faces") as pool:
        for start in range(0, len(missing), _BATCH):
            batch = missing.iloc[start : start + _BATCH]
            boxes = pool.map(_search, [folder / path for path in batch["path"]], batch["key"])
            found: list[tuple[Any, ...]] = []
            for key, box in zip(batch["key"].tolist(), boxes, strict=True):
                (unreadable if box is None else found).append((key, *(box or _NO_FACE)))
            frames: list[pd.DataFrame] = [known, _frame(found)]
            known = pd.concat(frames, ignore_index=True)
            done = start + len(batch)
            if done == len(missing) or time.monotonic() - saved >= SAVE_SECONDS:
                saved = time.monotonic()
                with atomic_path(table) as temporary:
                    known.assign(detector=DETECTOR).to_parquet(temporary, index=False)
            if on_progress is not None:
                on_progress(done, len(missing))
    frames = [known[known["key"].isin(wanted["key"])], _frame(unreadable)]
    return pd.concat(frames, ignore_index=True)


def largest_face(image: Image.Image) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest face in an upright image of mode RGB, in its pixels; zeros for none."""
    width = image.width
    image = image.copy()
    image.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    scale = width / image.width
    found = _cascade().detectMultiScale(
        np.asarray(image.convert("L")), 1.1, 4, minSize=(_SMALLEST_FACE, _SMALLEST_FACE)
    )
    # of two equally large ones the upper left, whatever order they were found in
    boxes = sorted((-w * h, y, x, h, w) for x, y, w, h in np.asarray(found).reshape(-1, 4).tolist())
    if not boxes:
        return _NO_FACE
    top, left, height, width = (round(edge * scale) for edge in boxes[0][1:])
    return top, left, height, width


def _search(path: Path, key: str) -> tuple[int, int, int, int] | None:
    """The largest face in a file, or None when it no longer is the image that was scanned."""
    try:
        with unexpected_as_unreadable():
            # what is found in an edited image must not be kept under the old one's key
            return largest_face(load_upright(path)) if sha256_file(path) == key else None
    except UnreadableImage:
        return None


_local = threading.local()


def _cascade() -> Any:
    """The detector of this thread; one cannot be shared."""
    if not hasattr(_local, "cascade"):
        import cv2

        _local.cascade = cv2.CascadeClassifier(str(_cascade_path(cv2)))
    return _local.cascade


def _cascade_path(cv2: Any) -> Path:
    return Path(cv2.__file__).parent / "data" / _CASCADE


def _read_table(table: Path) -> pd.DataFrame:
    if not table.exists():
        return _frame([])
    recorded = pd.read_parquet(table)
    return recorded.loc[recorded["detector"] == DETECTOR, list(FACE_COLUMNS)]


def _frame(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    types = {column: "str" if column == "key" else "int64" for column in FACE_COLUMNS}
    return pd.DataFrame(rows, columns=list(FACE_COLUMNS)).astype(types)
