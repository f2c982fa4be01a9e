"""The crop plan: for each image its bucket, the size it is resized to, and the window cut from that.

One plan serves the VAE encoder, which cuts the pixels, and the micro-conditioning, which tells the UNet where they were cut
(Podell et al. 2023, "SDXL", section 2.2). It is a pure function of the settings, the seed and each image's key, so planning again
gives the same crops, and adding an image moves no other's.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.buckets.bucket_sizes import (
    bucket_aspects,
    bucket_sizes,
    covering_sizes,
    downsampled_sizes,
    filter_reasons,
)
from sdxl_pipeline.data.buckets.hash_rng import below, fractions

TRAIN = "train"
EVAL = "eval"

_IMAGES_AT_A_TIME = 100_000
"""Bounds the memory of what is computed on the way; the plan does not depend on it."""


@dataclass(frozen=True)
class Crop:
    """Geometry of one crop, in pixels.

    `original_*` is the upright image as it lies on disk. `source_*` is what the dataset's `maximum_image_size` makes of it. It is
    resized to `resized_*`, and the window of `bucket_*` is cut at (`crop_top`, `crop_left`) of that. A `flipped` image is mirrored
    left to right before all this, so `crop_left` counts from what was its right edge.
    """

    bucket_h: int
    bucket_w: int
    resized_h: int
    resized_w: int
    crop_top: int
    crop_left: int
    original_h: int
    original_w: int
    source_h: int
    source_w: int
    flipped: bool = False


ROW_COLUMNS = ("path", "key", "crop_index", *Crop.__dataclass_fields__, "split")


def plan_crops(
    dataset: ImageDataset,
    scanned: pd.DataFrame,
    seed: int,
    held_out: Collection[str],
    is_eval: bool,
    faces: pd.DataFrame | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The crops of a scanned dataset and the images its filters left out: (rows, dropped).

    `scanned` is `scan_dataset`'s frame, of which the kept rows are planned. The rows have ROW_COLUMNS, in the order of `scanned`;
    `dropped` has the columns path and reason. Every row is `eval` when `is_eval`; else those of the keys `held_out` are
    (sdxl_pipeline.data.buckets.holdout). `faces` is `find_faces`'s frame, for crop_style face.

    A train image has `crops_per_image` crops, drawn independently, less those that came out the same; with `random_flip` each of
    them is followed by its mirror image. They are numbered from 0 by `crop_index`. An eval image has one, as it is, so that it is
    measured once and on itself.
    """
    kept = scanned.loc[scanned["status"] == "kept", ["path", "key", "height", "width"]]
    parts = [
        _plan(dataset, kept.iloc[start : start + _IMAGES_AT_A_TIME], seed, held_out, is_eval, faces)
        for start in range(0, max(len(kept), 1), _IMAGES_AT_A_TIME)
    ]
    rows, dropped = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    return rows, dropped


def plan_crop(
    dataset: ImageDataset, height: int, width: int, key: str, seed: int, crop_index: int = 0
) -> Crop:
    """One crop of one image of `height` x `width` pixels whose content has the digest `key`, not mirrored; filters aside."""
    cut = _cut(dataset, np.array([height]), np.array([width]), [key], np.array([crop_index]), seed, None)
    return Crop(**{name: int(values[0]) for name, values in cut.items()}, flipped=False)


def fresh_place(style: str, slack_h: int, slack_w: int, seed: int, key: str, draw: str) -> tuple[int, int]:
    """(top, left) of a window that may be moved by `slack_h` and `slack_w` pixels within its resized image.

    `draw` tells draws of one image apart: their number in the plan, anything else for crops drawn anew. Equal arguments give
    equal places on every machine. `face` has no place to draw; it keeps the one that was planned. Raises ValueError for it.
    """
    top, left = _places(style, np.array([slack_h]), np.array([slack_w]), [key], [draw], seed)
    return int(top[0]), int(left[0])


def images_per_bucket(rows: pd.DataFrame) -> pd.Series:
    """How many train images have a crop in each bucket, by (bucket_h, bucket_w)."""
    train = rows[rows["split"] == TRAIN]
    if (train["crop_index"] > 0).any():
        train = train.drop_duplicates(["path", "bucket_h", "bucket_w"])
    return train.groupby(["bucket_h", "bucket_w"]).size()


def _plan(
    dataset: ImageDataset,
    kept: pd.DataFrame,
    seed: int,
    held_out: Collection[str],
    is_eval: bool,
    faces: pd.DataFrame | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`plan_crops` of some images."""
    reasons = filter_reasons(dataset, kept["height"].to_numpy(), kept["width"].to_numpy())
    left_out = reasons != ""
    dropped = pd.DataFrame({"path": kept["path"][left_out], "reason": reasons[left_out]}, dtype="str")
    kept = kept[~left_out]
    keys = kept["key"].tolist()
    measured = np.full(len(kept), True) if is_eval else kept["key"].isin(list(held_out)).to_numpy()
    centres = None if faces is None else _face_centres(kept["key"], faces)

    # a row per crop: which image it is of, and its number among that one's draws
    image = np.repeat(np.arange(len(kept)), np.where(measured, 1, dataset.crops_per_image))
    draw = _numbered(image)
    cut = _cut(
        dataset,
        kept["height"].to_numpy()[image],
        kept["width"].to_numpy()[image],
        [keys[index] for index in image.tolist()],
        draw,
        seed,
        None if centres is None else centres[image],
    )
    if dataset.crops_per_image > 1:
        place = {name: cut[name] for name in ("bucket_h", "bucket_w", "crop_top", "crop_left")}
        first = np.flatnonzero(~pd.DataFrame({"image": image} | place).duplicated())
        image, draw, cut = image[first], draw[first], _taken(cut, first)
    flipped = np.full(len(image), False)
    if dataset.random_flip:
        crop = np.repeat(np.arange(len(image)), np.where(measured[image], 1, 2))
        image, draw, cut = image[crop], draw[crop], _taken(cut, crop)
        flipped = _numbered(crop) == 1
        from_the_right = cut["resized_w"] - cut["bucket_w"] - cut["crop_left"]
        cut["crop_left"] = np.where(flipped, from_the_right, cut["crop_left"])
    rows = pd.DataFrame(
        {
            "path": kept["path"].array.take(image),
            "key": kept["key"].array.take(image),
            "crop_index": _numbered(image),
            **cut,
            "flipped": flipped,
            "split": pd.array(np.where(measured, EVAL, TRAIN), dtype="str").take(image),
        },
        columns=list(ROW_COLUMNS),
    )
    return rows.astype({"path": "str", "key": "str"}), dropped


def _cut(
    dataset: ImageDataset,
    heights: np.ndarray,
    widths: np.ndarray,
    keys: list[str],
    draws: np.ndarray,
    seed: int,
    centres: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The fields of Crop but `flipped`, an element for each of N draws; `centres` are those of faces, (N, 2), NaN where there is none.

    An image is resized, its aspect kept, to the smallest size that covers its bucket. Where crops are taken and the dataset has a
    `maximum_image_size`, it is instead cut from its own or its downsampled size, if that covers the bucket.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    aspects = bucket_aspects(dataset, heights, widths, keys, draws, seed)
    bucket_h, bucket_w = bucket_sizes(dataset, aspects)
    covering_h, covering_w = covering_sizes(heights, widths, bucket_h, bucket_w)
    source_h, source_w = downsampled_sizes(dataset, heights, widths)
    too_far = (source_h < bucket_h) | (source_w < bucket_w)  # shrink no further than what covers the bucket
    source_h = np.where(too_far, np.minimum(heights, covering_h), source_h)
    source_w = np.where(too_far, np.minimum(widths, covering_w), source_w)
    resized_h, resized_w = covering_h, covering_w
    if dataset.crop and dataset.maximum_image_size is not None:
        covers = (source_h >= bucket_h) & (source_w >= bucket_w)
        resized_h = np.where(covers, source_h, covering_h)
        resized_w = np.where(covers, source_w, covering_w)
    # without crops a few pixels still have to go where the aspect is not quite the bucket's: as many on either side
    style = dataset.crop_style if dataset.crop else "center"
    slack_h, slack_w = resized_h - bucket_h, resized_w - bucket_w
    if style == "face":
        if centres is None:
            raise ValueError("crop_style face needs to be told where the faces are")
        top = _around(centres[:, 0] * resized_h / heights, bucket_h, slack_h)
        left = _around(centres[:, 1] * resized_w / widths, bucket_w, slack_w)
    else:
        top, left = _places(style, slack_h, slack_w, keys, draws.tolist(), seed)
    return {
        "bucket_h": bucket_h,
        "bucket_w": bucket_w,
        "resized_h": resized_h,
        "resized_w": resized_w,
        "crop_top": top,
        "crop_left": left,
        "original_h": heights,
        "original_w": widths,
        "source_h": source_h,
        "source_w": source_w,
    }


def _places(
    style: str, slack_h: np.ndarray, slack_w: np.ndarray, keys: list[str], draws: list[Any], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tops and lefts of windows that may be moved by so many pixels."""
    match style:
        case "random":
            drawn = fractions(f"crop/{seed}/{key}/{draw}" for key, draw in zip(keys, draws, strict=True))
            return below(drawn[:, 0], slack_h + 1), below(drawn[:, 1], slack_w + 1)
        case "center":
            return slack_h // 2, slack_w // 2
        case "corner":
            return np.zeros_like(slack_h), np.zeros_like(slack_w)
    raise ValueError(f"crop_style {style!r} has no place to draw; it is not one of random, center, corner")


def _around(centres: np.ndarray, lengths: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Where windows begin that have something in their middle, as far as the edges allow; without it they stand in the middle."""
    starts = np.where(np.isnan(centres), slack // 2, np.rint(centres - lengths / 2))
    return np.clip(starts, 0, slack).astype(np.int64)


def _face_centres(keys: pd.Series, faces: pd.DataFrame) -> np.ndarray:
    """(y, x) of the middle of each image's face, in its own pixels; NaN where it has none."""
    known = faces.drop_duplicates("key").set_index("key").reindex(keys)
    centres = [known["top"] + known["height"] / 2, known["left"] + known["width"] / 2]
    return np.where(known["height"].to_numpy()[:, None] > 0, np.stack(centres, axis=1), np.nan)


def _taken(columns: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[places] for name, values in columns.items()}


def _numbered(groups: np.ndarray) -> np.ndarray:
    """0, 1, ... within each run of equal values."""
    places = np.arange(len(groups))
    begins = np.ones(len(groups), dtype=bool)
    begins[1:] = groups[1:] != groups[:-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0))
