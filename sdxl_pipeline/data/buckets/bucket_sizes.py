"""Aspect buckets: the training size of each image, and filters for images that are too small or too narrow.

The formula is SimpleTuner's for every aspect: the target area as a square edge rounded to the alignment, spread over the image's
rounded aspect ratio, each edge rounded again. Sizes are (height, width) in pixels. Functions with plural names take arrays with an
element per image, since a dataset may have millions; their results equal those of the scalar formula bit for bit.
"""

import math

import numpy as np

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.buckets.hash_rng import hash_uint64

MAX_BUCKET_AREAS = 8
"""Maximum area of an image's own bucket, in square buckets; it drops aspects beyond about 1:16,000 at 1024."""


def bucket_size(
    aspect: float, resolution: float, resolution_type: str, alignment: int = 64
) -> tuple[int, int]:
    """Return (height, width) of the bucket for a rounded aspect ratio (width / height), both multiples of `alignment`.

    `resolution` is in megapixels for `area`; an edge N of N*N pixels for `pixel_area`; the shorter edge for `pixel`.
    """
    if resolution_type == "area":
        edge = _round_to_multiple(math.isqrt(round(resolution * 1e6)), alignment)
    else:
        edge = _round_to_multiple(resolution, alignment)
    if resolution_type == "pixel":
        if aspect < 1:
            return _round_to_multiple(edge / aspect, alignment), edge
        return edge, _round_to_multiple(edge * aspect, alignment)
    stretch = math.sqrt(aspect)
    return _round_to_multiple(edge / stretch, alignment), _round_to_multiple(edge * stretch, alignment)


def aspect_ratios(heights: np.ndarray, widths: np.ndarray, rounding: int) -> np.ndarray:
    """Return width / height, rounded so that images of similar shape share a bucket: float64 of shape (N,).

    A ratio that would round to 0 is not rounded.
    """
    exact = widths / heights
    scaled = exact * 10.0**rounding
    rounded = np.rint(scaled) / 10.0**rounding
    # near a tie the rounding error of the product would decide; Python's round is exact
    close = np.abs(scaled - np.floor(scaled) - 0.5) <= 1e-6 + scaled * 1e-15
    rounded[close] = [round(ratio, rounding) for ratio in exact[close].tolist()]
    return np.where(rounded == 0, exact, rounded)


def bucket_sizes(dataset: ImageDataset, aspects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths of the buckets for rounded aspect ratios, at the dataset's resolution: int64 of shape (N,)."""
    distinct, bucket_index = np.unique(aspects, return_inverse=True)
    sizes = np.array([_bucket(dataset, aspect) for aspect in distinct.tolist()], dtype=np.int64)
    heights, widths = sizes.reshape(-1, 2).T
    return heights[bucket_index], widths[bucket_index]


def bucket_aspects(
    dataset: ImageDataset,
    heights: np.ndarray,
    widths: np.ndarray,
    keys: list[str],
    crop_indices: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Return the aspect ratio of each crop: float64 of shape (N,).

    `square`: 1. `preserve`, and without cropping: the image's own. `closest`: the one of `crop_aspect_buckets` that crops the least.
    `random`: one of them by their weights, sampled from (seed, key, crop index). With a `max_upscale_threshold` the latter two use
    only aspects whose bucket needs no more enlargement; `filter_reasons` drops images for which there is none.
    """
    if not dataset.crop or dataset.crop_aspect == "preserve":
        return aspect_ratios(heights, widths, dataset.aspect_bucket_rounding)
    if dataset.crop_aspect == "square":
        return np.ones(len(heights))
    aspects = np.array(_listed_aspects(dataset))
    allowed = _allowed_aspects(dataset, heights, widths)
    allowed[~allowed.any(axis=1)] = True
    if dataset.crop_aspect == "closest":
        exact = (widths / heights)[:, None]
        retained_share = np.minimum(aspects / exact, exact / aspects)
        return aspects[np.where(allowed, retained_share, 0).argmax(axis=1)]
    weights = np.array(dataset.crop_aspect_weights or [1.0] * len(aspects))
    cumulative = np.cumsum(np.where(allowed, weights, 0.0), axis=1)
    names = (
        f"aspect/{seed}/{key}/{crop_index}"
        for key, crop_index in zip(keys, crop_indices.tolist(), strict=True)
    )
    thresholds = hash_uint64(names)[:, 0] / 2.0**64 * cumulative[:, -1]
    last_allowed = len(aspects) - 1 - allowed[:, ::-1].argmax(axis=1)
    return aspects[np.minimum((cumulative <= thresholds[:, None]).sum(axis=1), last_allowed)]


def covering_sizes(
    heights: np.ndarray, widths: np.ndarray, bucket_h: np.ndarray, bucket_w: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest sizes of the images' own aspects that cover their buckets: one edge is exact, the other rounded."""
    by_width = bucket_w * heights >= bucket_h * widths
    return (
        np.where(by_width, _scale(heights, bucket_w, widths), bucket_h),
        np.where(by_width, bucket_w, _scale(widths, bucket_h, heights)),
    )


def downsampled_sizes(
    dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images' sizes after `maximum_image_size`: a larger image is downsampled to `target_downsample_size`, same aspect.

    Both are in the unit of `resolution_type` (megapixels; N for N*N pixels; the shorter edge). An image at or below the maximum or
    the target is unchanged.
    """
    if dataset.maximum_image_size is None or dataset.target_downsample_size is None:
        return heights, widths
    measure = _measures(dataset.resolution_type, heights, widths)
    scale = _threshold(dataset.resolution_type, dataset.target_downsample_size) / measure
    if dataset.resolution_type != "pixel":
        scale = np.sqrt(scale)
    shrinks = (measure > _threshold(dataset.resolution_type, dataset.maximum_image_size)) & (scale < 1)
    small_h, small_w = (np.maximum(np.rint(edges * scale), 1).astype(np.int64) for edges in (heights, widths))
    return np.where(shrinks, small_h, heights), np.where(shrinks, small_w, widths)


def filter_reasons(dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the reason, with the settings key, why the dataset drops each image; "" if it does not: str of shape (N,)."""
    ratios = aspect_ratios(heights, widths, dataset.aspect_bucket_rounding)
    reasons: dict[str, np.ndarray] = {
        "smaller than minimum_image_size": _below_minimum(dataset, heights, widths)
    }
    if dataset.minimum_aspect_ratio is not None:
        reasons["narrower than minimum_aspect_ratio"] = ratios < dataset.minimum_aspect_ratio
    if dataset.maximum_aspect_ratio is not None:
        reasons["wider than maximum_aspect_ratio"] = ratios > dataset.maximum_aspect_ratio
    chooses_aspect = dataset.crop and dataset.crop_aspect in ("closest", "random")
    square = dataset.crop and dataset.crop_aspect == "square"
    if not chooses_aspect:
        bucket_h, bucket_w = bucket_sizes(dataset, np.ones(len(heights)) if square else ratios)
    if dataset.max_upscale_threshold is not None:
        within_threshold: np.ndarray
        if chooses_aspect:
            within_threshold = np.asarray(_allowed_aspects(dataset, heights, widths).any(axis=1))
        else:
            within_threshold = (
                _enlargement(heights, widths, bucket_h, bucket_w) <= dataset.max_upscale_threshold
            )
        reasons["needs more enlarging than max_upscale_threshold"] = ~within_threshold
    if not chooses_aspect and not square:
        square_h, square_w = _bucket(dataset, 1.0)
        # in floats, since the areas of such buckets may overflow
        areas: np.ndarray = bucket_h * 1.0 * bucket_w
        reasons["too long and narrow for a bucket of its own aspect"] = (
            areas > MAX_BUCKET_AREAS * square_h * square_w
        )
    return np.select(list(reasons.values()), list(reasons), "")


def _bucket(dataset: ImageDataset, aspect: float) -> tuple[int, int]:
    return bucket_size(aspect, dataset.resolution, dataset.resolution_type, dataset.aspect_bucket_alignment)


def _listed_aspects(dataset: ImageDataset) -> list[float]:
    return [round(aspect, dataset.aspect_bucket_rounding) or aspect for aspect in dataset.crop_aspect_buckets]


def _allowed_aspects(dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return which of `crop_aspect_buckets` each image covers within `max_upscale_threshold`: bool of shape (N, aspects)."""
    aspects = _listed_aspects(dataset)
    if dataset.max_upscale_threshold is None:
        return np.full((len(heights), len(aspects)), True)
    sizes = np.array([_bucket(dataset, aspect) for aspect in aspects])
    return (
        _enlargement(heights[:, None], widths[:, None], sizes[:, 0], sizes[:, 1])
        <= dataset.max_upscale_threshold
    )


def _enlargement(
    heights: np.ndarray, widths: np.ndarray, bucket_h: np.ndarray, bucket_w: np.ndarray
) -> np.ndarray:
    """Return the share by which the images must be enlarged to cover the buckets."""
    return np.maximum(bucket_h / heights, bucket_w / widths) - 1


def _below_minimum(dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    if not dataset.minimum_image_size:
        return np.full(len(heights), False)
    threshold = _threshold(dataset.resolution_type, dataset.minimum_image_size)
    below: np.ndarray = _measures(dataset.resolution_type, heights, widths) < threshold
    if dataset.resolution_type != "pixel" and dataset.crop and dataset.crop_aspect == "square":
        # a narrow image may have the area but contain no square of that area
        below |= np.minimum(heights, widths) < math.isqrt(round(threshold))
    return below


def _measures(resolution_type: str, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the quantity that is compared in this unit: the area, or the shorter edge."""
    return np.minimum(heights, widths) if resolution_type == "pixel" else heights * widths


def _threshold(resolution_type: str, size: float) -> float:
    match resolution_type:
        case "area":
            return size * 1e6
        case "pixel_area":
            return size * size
    return size


def _round_to_multiple(value: float, multiple: int) -> int:
    return max(round(value / multiple) * multiple, multiple)


def _scale(lengths: np.ndarray, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    # in integers, rounding half up: never below the edge to cover
    return (2 * lengths * numerators + denominators) // (2 * denominators)
