"""The crop plan: for each image its bucket, the resized size, and the crop window.

The VAE stage crops the pixels by this plan, and the micro-conditioning passes the same crop coordinates to the UNet (Podell et al.
2023, "SDXL", section 2.2). The plan is a pure function of the settings, the seed and each image's key: it is reproducible, and an
added image changes no other image's crop.
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
from sdxl_pipeline.data.buckets.hash_rng import hash_uint64, scale_to_limits

TRAIN = "train"
EVAL = "eval"

_IMAGES_PER_CHUNK = 100_000
"""Bounds the memory of intermediate results; the plan does not depend on it."""


@dataclass(frozen=True)
class Crop:
    """Geometry of one crop, in pixels.

    `original_*` is the upright image on disk, `source_*` its size after the dataset's `maximum_image_size`. The image is resized to
    `resized_*`, and the window of size `bucket_*` is cropped at (`crop_top`, `crop_left`). A `flipped` image is mirrored
    horizontally before that, so `crop_left` counts from the original's right edge.
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
    """Return (rows, dropped): the crops of a scanned dataset, and the images that its filters drop.

    `scanned` is the frame of `scan_dataset`, whose kept rows are planned. The rows have ROW_COLUMNS, in the order of `scanned`;
    `dropped` has the columns path and reason. The split is `eval` for every row if `is_eval`, else for the keys in `held_out`
    (sdxl_pipeline.data.buckets.holdout). `faces` is the frame of `find_faces`, for crop_style face.

    A train image has `crops_per_image` independently sampled crops without duplicates; with `random_flip` each of them is followed by
    its mirror image. `crop_index` numbers them from 0. An eval image has one crop, not mirrored, so that it is evaluated once.
    """
    kept = scanned.loc[scanned["status"] == "kept", ["path", "key", "height", "width"]]
    parts = [
        _plan(dataset, kept.iloc[start : start + _IMAGES_PER_CHUNK], seed, held_out, is_eval, faces)
        for start in range(0, max(len(kept), 1), _IMAGES_PER_CHUNK)
    ]
    rows, dropped = (pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True))
    return rows, dropped


def plan_crop(
    dataset: ImageDataset, height: int, width: int, key: str, seed: int, crop_index: int = 0
) -> Crop:
    """Return one crop, not mirrored and not filtered, of an image of `height` x `width` pixels with the content digest `key`."""
    crops = _crop_geometry(
        dataset, np.array([height]), np.array([width]), [key], np.array([crop_index]), seed, None
    )
    return Crop(**{name: int(values[0]) for name, values in crops.items()}, flipped=False)


def crop_offset(style: str, slack_h: int, slack_w: int, seed: int, key: str, draw: str) -> tuple[int, int]:
    """Return (top, left) of a crop window with `slack_h` and `slack_w` pixels of freedom within its resized image.

    `draw` distinguishes crops of one image: their index in the plan, or any other string for crops sampled during training. Equal
    arguments give equal positions on every machine. Raises ValueError for the style `face`, whose position is fixed by the plan.
    """
    top, left = _crop_offsets(style, np.array([slack_h]), np.array([slack_w]), [key], [draw], seed)
    return int(top[0]), int(left[0])


def images_per_bucket(rows: pd.DataFrame) -> pd.Series:
    """Return the number of train images with a crop in each bucket, by (bucket_h, bucket_w)."""
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
    """Return `plan_crops` of a chunk of images."""
    reasons = filter_reasons(dataset, kept["height"].to_numpy(), kept["width"].to_numpy())
    is_dropped = reasons != ""
    dropped = pd.DataFrame({"path": kept["path"][is_dropped], "reason": reasons[is_dropped]}, dtype="str")
    kept = kept[~is_dropped]
    keys = kept["key"].tolist()
    is_eval_image = np.full(len(kept), True) if is_eval else kept["key"].isin(list(held_out)).to_numpy()
    centres = None if faces is None else _face_centres(kept["key"], faces)

    # a row per crop: the index of its image, and its number among the crops of that image
    image = np.repeat(np.arange(len(kept)), np.where(is_eval_image, 1, dataset.crops_per_image))
    number = _index_within_runs(image)
    crops = _crop_geometry(
        dataset,
        kept["height"].to_numpy()[image],
        kept["width"].to_numpy()[image],
        [keys[index] for index in image.tolist()],
        number,
        seed,
        None if centres is None else centres[image],
    )
    if dataset.crops_per_image > 1:
        geometry = {name: crops[name] for name in ("bucket_h", "bucket_w", "crop_top", "crop_left")}
        first = np.flatnonzero(~pd.DataFrame({"image": image} | geometry).duplicated())
        image, number, crops = image[first], number[first], _take(crops, first)
    flipped = np.full(len(image), False)
    if dataset.random_flip:
        crop = np.repeat(np.arange(len(image)), np.where(is_eval_image[image], 1, 2))
        image, number, crops = image[crop], number[crop], _take(crops, crop)
        flipped = _index_within_runs(crop) == 1
        mirrored_left = crops["resized_w"] - crops["bucket_w"] - crops["crop_left"]
        crops["crop_left"] = np.where(flipped, mirrored_left, crops["crop_left"])
    rows = pd.DataFrame(
        {
            "path": kept["path"].array.take(image),
            "key": kept["key"].array.take(image),
            "crop_index": _index_within_runs(image),
            **crops,
            "flipped": flipped,
            "split": pd.array(np.where(is_eval_image, EVAL, TRAIN), dtype="str").take(image),
        },
        columns=list(ROW_COLUMNS),
    )
    return rows.astype({"path": "str", "key": "str"}), dropped


def _crop_geometry(
    dataset: ImageDataset,
    heights: np.ndarray,
    widths: np.ndarray,
    keys: list[str],
    crop_indices: np.ndarray,
    seed: int,
    centres: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Return the fields of Crop except `flipped` as arrays of N crops; `centres` are those of faces, (N, 2), NaN for none.

    An image is resized, keeping its aspect, to the smallest size that covers its bucket. With cropping and a `maximum_image_size`,
    the crop is instead cut from the image's own or downsampled size, if that covers the bucket.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    aspects = bucket_aspects(dataset, heights, widths, keys, crop_indices, seed)
    bucket_h, bucket_w = bucket_sizes(dataset, aspects)
    covering_h, covering_w = covering_sizes(heights, widths, bucket_h, bucket_w)
    source_h, source_w = downsampled_sizes(dataset, heights, widths)
    too_small = (source_h < bucket_h) | (source_w < bucket_w)  # shrink no further than what covers the bucket
    source_h = np.where(too_small, np.minimum(heights, covering_h), source_h)
    source_w = np.where(too_small, np.minimum(widths, covering_w), source_w)
    resized_h, resized_w = covering_h, covering_w
    if dataset.crop and dataset.maximum_image_size is not None:
        covers = (source_h >= bucket_h) & (source_w >= bucket_w)
        resized_h = np.where(covers, source_h, covering_h)
        resized_w = np.where(covers, source_w, covering_w)
    # without cropping, the few pixels beyond the bucket's aspect are removed equally from both sides
    style = dataset.crop_style if dataset.crop else "center"
    slack_h, slack_w = resized_h - bucket_h, resized_w - bucket_w
    if style == "face":
        if centres is None:
            raise ValueError('crop_style "face" needs `faces`, the frame of find_faces')
        top = _centred_offsets(centres[:, 0] * resized_h / heights, bucket_h, slack_h)
        left = _centred_offsets(centres[:, 1] * resized_w / widths, bucket_w, slack_w)
    else:
        top, left = _crop_offsets(style, slack_h, slack_w, keys, crop_indices.tolist(), seed)
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


def _crop_offsets(
    style: str, slack_h: np.ndarray, slack_w: np.ndarray, keys: list[str], crop_indices: list[Any], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tops and lefts of crop windows with these pixels of freedom."""
    match style:
        case "random":
            hashes = hash_uint64(
                f"crop/{seed}/{key}/{number}" for key, number in zip(keys, crop_indices, strict=True)
            )
            return scale_to_limits(hashes[:, 0], slack_h + 1), scale_to_limits(hashes[:, 1], slack_w + 1)
        case "center":
            return slack_h // 2, slack_w // 2
        case "corner":
            return np.zeros_like(slack_h), np.zeros_like(slack_w)
    raise ValueError(f"crop_style {style!r} has no computed position; it must be random, center or corner")


def _centred_offsets(centres: np.ndarray, lengths: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Return the offsets of windows around `centres`, clipped to the image; windows without a centre are in the middle."""
    starts = np.where(np.isnan(centres), slack // 2, np.rint(centres - lengths / 2))
    return np.clip(starts, 0, slack).astype(np.int64)


def _face_centres(keys: pd.Series, faces: pd.DataFrame) -> np.ndarray:
    """Return (y, x) of the centre of each image's face in pixels of the image; NaN if it has none."""
    known = faces.drop_duplicates("key").set_index("key").reindex(keys)
    centres = [known["top"] + known["height"] / 2, known["left"] + known["width"] / 2]
    return np.where(known["height"].to_numpy()[:, None] > 0, np.stack(centres, axis=1), np.nan)


def _take(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in columns.items()}


def _index_within_runs(values: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... within each run of equal values."""
    positions = np.arange(len(values))
    run_starts = np.ones(len(values), dtype=bool)
    run_starts[1:] = values[1:] != values[:-1]
    return positions - np.maximum.accumulate(np.where(run_starts, positions, 0))
