"""The crop plan: for each picture its bucket, the size it is resized to, and the window cut from that.

One plan serves the VAE encoder, which cuts the pixels, and the micro-conditioning, which tells the UNet where they were cut
(Podell et al. 2023, "SDXL", section 2.2). It is a pure function of the settings, the seed and each picture's key, so planning again
gives the same crops, and adding a picture moves no other's.
"""

import hashlib
from dataclasses import asdict, dataclass

import pandas as pd

from sdxl_pipeline.images.buckets import covering_size, dataset_bucket, downsampled_size, filter_reason
from sdxl_pipeline.project.datasets import ImageDataset

TRAIN = "train"
EVAL = "eval"


@dataclass(frozen=True)
class Crop:
    """Geometry of one crop, in pixels.

    `original_*` is the upright picture as it lies on disk. `source_*` is what the dataset's `maximum_image_size` makes of it. It is
    resized to `resized_*`, and the window of `bucket_*` is cut at (`crop_top`, `crop_left`) of that.
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


ROW_COLUMNS = ("path", "key", "crop_index", *Crop.__dataclass_fields__, "split")


def plan_crops(
    dataset: ImageDataset, scanned: pd.DataFrame, seed: int, holdout_share: float, is_eval: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The crops of a scanned dataset and the pictures its filters left out: (rows, dropped).

    `scanned` is `scan_dataset`'s frame, of which the kept rows are planned. The rows have ROW_COLUMNS, one per picture, in the
    order of `scanned`; `dropped` has the columns path and reason. Every row is `eval` when `is_eval`; else a share of about
    `holdout_share` is, chosen by picture key.
    """
    rows: list[dict[str, object]] = []
    dropped: list[tuple[str, str]] = []
    kept = scanned[scanned["status"] == "kept"]
    pictures = zip(
        kept["path"].tolist(),
        kept["key"].tolist(),
        kept["height"].tolist(),
        kept["width"].tolist(),
        strict=True,
    )
    for path, key, height, width in pictures:
        if reason := filter_reason(dataset, height, width):
            dropped.append((path, reason))
            continue
        split = EVAL if is_eval or held_out(key, holdout_share) else TRAIN
        crop = plan_crop(dataset, height, width, key, seed)
        rows.append({"path": path, "key": key, "crop_index": 0, **asdict(crop), "split": split})
    frame = pd.DataFrame(rows, columns=list(ROW_COLUMNS))
    text = ("path", "key", "split")
    types = {column: "str" if column in text else "int64" for column in ROW_COLUMNS}
    return frame.astype(types), pd.DataFrame(dropped, columns=["path", "reason"], dtype="str")


def plan_crop(
    dataset: ImageDataset, height: int, width: int, key: str, seed: int, crop_index: int = 0
) -> Crop:
    """The crop of one picture of `height` x `width` pixels whose content has the digest `key`.

    The picture is resized, its aspect kept, to the smallest size that covers its bucket. Where crops are taken and the dataset has
    a `maximum_image_size`, it is instead cut from its own or its downsampled size, if that covers the bucket.
    """
    bucket_h, bucket_w = dataset_bucket(dataset, height, width)
    covering_h, covering_w = covering_size(height, width, bucket_h, bucket_w)
    source_h, source_w = downsampled_size(dataset, height, width)
    if source_h < bucket_h or source_w < bucket_w:  # shrunk too far: no further than what covers the bucket
        source_h, source_w = min(height, covering_h), min(width, covering_w)
    resized_h, resized_w = covering_h, covering_w
    if (
        dataset.crop
        and dataset.maximum_image_size is not None
        and source_h >= bucket_h
        and source_w >= bucket_w
    ):
        resized_h, resized_w = source_h, source_w
    # without crops a few pixels still have to go where the aspect is not quite the bucket's: as many on either side
    style = dataset.crop_style if dataset.crop else "center"
    top, left = _crop_offset(style, resized_h - bucket_h, resized_w - bucket_w, f"{seed}/{key}/{crop_index}")
    return Crop(
        bucket_h=bucket_h,
        bucket_w=bucket_w,
        resized_h=resized_h,
        resized_w=resized_w,
        crop_top=top,
        crop_left=left,
        original_h=height,
        original_w=width,
        source_h=source_h,
        source_w=source_w,
    )


def held_out(key: str, share: float) -> bool:
    """Whether a picture is kept from training to measure it by: a matter of its content alone.

    So it stays on its side when others come and go, under every seed, and when the share grows only new ones change sides.
    """
    return _fractions(f"holdout/{key}")[0] < share * 2**64


def _crop_offset(style: str, slack_h: int, slack_w: int, identity: str) -> tuple[int, int]:
    match style:
        case "random":
            fraction_h, fraction_w = _fractions(f"crop/{identity}")
            return fraction_h * (slack_h + 1) >> 64, fraction_w * (slack_w + 1) >> 64
        case "center":
            return slack_h // 2, slack_w // 2
        case "corner":
            return 0, 0
    raise ValueError(f"crop_style {style!r} is not one of random, center, corner")


def _fractions(text: str) -> tuple[int, int]:
    """Two evenly spread integers below 2**64, drawn from a text; the same ones on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
