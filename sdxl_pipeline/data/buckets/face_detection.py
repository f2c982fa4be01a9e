"""Face detection for crop_style face, with OpenCV's frontal-face cascade (the optional extra `faces`).

The detector finds upright frontal faces and misses profiles. Of the cascades in the wheel it has the fewest false positives: none on
one photograph at 48 sizes, where SimpleTuner's choice, `default`, has a false largest face at 7 sizes. Results are stored in a table
by image content, so each image is searched once.
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
"""Version of the detector in the table; rows of another version are searched again. Change it when the results change."""

FACE_COLUMNS = ("key", "top", "left", "height", "width")
SAVE_SECONDS = 30.0
"""Interval between writes of the table, and so the most work that a kill loses."""

_CASCADE = "haarcascade_frontalface_alt.xml"
_LONGEST_EDGE = 1024  # images are searched at this size; a face below 1/20 of the image is not its subject
_SMALLEST_FACE = 48  # in pixels at that size
_NO_FACE_BOX = (0, 0, 0, 0)
_BATCH = 256


class FaceDetectorError(Exception):
    """OpenCV is missing for crop_style face. The message has the setting and the package to install."""


def require_detector(dataset: ImageDataset) -> None:
    """Raise FaceDetectorError if OpenCV is not installed, or its version lacks the detector."""
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
    """Return the largest face of each image content: a row of FACE_COLUMNS in pixels of the upright image, all 0 for no face.

    `kept` is a scan's frame of images in `folder`. `table` is the Parquet file of earlier results, whose images are not read again;
    it is replaced atomically every half minute. `on_progress(done, total)` counts the images to search. An image that is unreadable
    or has changed has no face, and is searched again the next time.
    """
    detected = _read_table(table)
    requested = kept[["key", "path"]].drop_duplicates("key")
    missing = requested[~requested["key"].isin(detected["key"])]
    unreadable_rows: list[tuple[Any, ...]] = []
    saved = time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="faces") as pool:
        for start in range(0, len(missing), _BATCH):
            batch = missing.iloc[start : start + _BATCH]
            faces = pool.map(_search, [folder / path for path in batch["path"]], batch["key"])
            boxes_found: list[tuple[Any, ...]] = []
            for key, box in zip(batch["key"].tolist(), faces, strict=True):
                (unreadable_rows if box is None else boxes_found).append((key, *(box or _NO_FACE_BOX)))
            frames: list[pd.DataFrame] = [detected, _frame(boxes_found)]
            detected = pd.concat(frames, ignore_index=True)
            done = start + len(batch)
            if done == len(missing) or time.monotonic() - saved >= SAVE_SECONDS:
                saved = time.monotonic()
                with atomic_path(table) as temporary:
                    detected.assign(detector=DETECTOR).to_parquet(temporary, index=False)
            if on_progress is not None:
                on_progress(done, len(missing))
    frames = [detected[detected["key"].isin(requested["key"])], _frame(unreadable_rows)]
    return pd.concat(frames, ignore_index=True)


def largest_face(image: Image.Image) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) in pixels of the largest face in an upright image of mode RGB; zeros for none."""
    width = image.width
    image = image.copy()
    image.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    scale = width / image.width
    boxes_found = _cascade().detectMultiScale(
        np.asarray(image.convert("L")), 1.1, 4, minSize=(_SMALLEST_FACE, _SMALLEST_FACE)
    )
    # of equally large faces the upper left one, independent of the order of detection
    faces = sorted((-w * h, y, x, h, w) for x, y, w, h in np.asarray(boxes_found).reshape(-1, 4).tolist())
    if not faces:
        return _NO_FACE_BOX
    top, left, height, width = (round(edge * scale) for edge in faces[0][1:])
    return top, left, height, width


def _search(path: Path, key: str) -> tuple[int, int, int, int] | None:
    """Return the largest face in a file; None if its content is no longer the scanned one."""
    try:
        with unexpected_as_unreadable():
            # a face in an edited image must not be stored under the old image's key
            return largest_face(load_upright(path)) if sha256_file(path) == key else None
    except UnreadableImage:
        return None


_local = threading.local()


def _cascade() -> Any:
    """Return the detector of this thread; it is not thread-safe."""
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
