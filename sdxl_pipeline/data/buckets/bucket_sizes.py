"""Aspect buckets: the size each image is trained at, and which images are not worth training on.

The formula is SimpleTuner's, kept for every aspect: a target area as a square edge rounded to the alignment, spread over the
image's rounded aspect ratio, each edge rounded again. Sizes are (height, width) in pixels. Functions in the plural take arrays, an
element per image, since a dataset may have millions; what they give is to the last bit what the formula gives for each by itself.
"""

import math

import numpy as np

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.buckets.hash_rng import fractions

MAX_BUCKET_AREAS = 8
"""An image whose own bucket would hold more pixels than this many square ones is left out: aspects beyond about 1:16,000 at 1024."""


def bucket_size(
    aspect: float, resolution: float, resolution_type: str, alignment: int = 64
) -> tuple[int, int]:
    """(height, width) of the bucket for an aspect ratio (width / height, already rounded), both multiples of `alignment`.

    `resolution` is megapixels for `area`; for `pixel_area` an edge N that stands for N*N pixels; for `pixel` the shorter edge.
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
    """Width over height, rounded so that images of nearly one shape share a bucket: float64 of shape (N,).

    An image too narrow for that many decimals keeps its own ratio rather than 0.
    """
    exact = widths / heights
    scaled = exact * 10.0**rounding
    rounded = np.rint(scaled) / 10.0**rounding
    # so near to a tie the product's own rounding could decide; Python's round looks at every decimal of the ratio
    close = np.abs(scaled - np.floor(scaled) - 0.5) <= 1e-6 + scaled * 1e-15
    rounded[close] = [round(ratio, rounding) for ratio in exact[close].tolist()]
    return np.where(rounded == 0, exact, rounded)


def bucket_sizes(dataset: ImageDataset, aspects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of the buckets for rounded aspect ratios, at the dataset's resolution: int64 of shape (N,)."""
    distinct, places = np.unique(aspects, return_inverse=True)
    sizes = np.array([_bucket(dataset, aspect) for aspect in distinct.tolist()], dtype=np.int64)
    heights, widths = sizes.reshape(-1, 2).T
    return heights[places], widths[places]


def bucket_aspects(
    dataset: ImageDataset,
    heights: np.ndarray,
    widths: np.ndarray,
    keys: list[str],
    draws: np.ndarray,
    seed: int,
) -> np.ndarray:
    """The aspect ratio that each crop is given: float64 of shape (N,).

    `square`: 1. `preserve`, and without cropping: the image's own. `closest`: the one of `crop_aspect_buckets` that crops the least
    away. `random`: one of them by their weights, drawn from (seed, key, draw). With a `max_upscale_threshold` these two choose only
    from aspects whose bucket needs no more enlarging; `filter_reasons` leaves out images for which there is none.
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
        kept_share = np.minimum(aspects / exact, exact / aspects)
        return aspects[np.where(allowed, kept_share, 0).argmax(axis=1)]
    weights = np.array(dataset.crop_aspect_weights or [1.0] * len(aspects))
    ends = np.cumsum(np.where(allowed, weights, 0.0), axis=1)
    names = (f"aspect/{seed}/{key}/{draw}" for key, draw in zip(keys, draws.tolist(), strict=True))
    lots = fractions(names)[:, 0] / 2.0**64 * ends[:, -1]
    last = len(aspects) - 1 - allowed[:, ::-1].argmax(axis=1)
    return aspects[np.minimum((ends <= lots[:, None]).sum(axis=1), last)]


def covering_sizes(
    heights: np.ndarray, widths: np.ndarray, bucket_h: np.ndarray, bucket_w: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest sizes of the images' own aspects that cover their buckets: one edge meets it exactly, the other is rounded."""
    by_width = bucket_w * heights >= bucket_h * widths
    return (
        np.where(by_width, _scale(heights, bucket_w, widths), bucket_h),
        np.where(by_width, bucket_w, _scale(widths, bucket_h, heights)),
    )


def downsampled_sizes(
    dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The images' sizes after `maximum_image_size`: one above it is shrunk, aspect kept, to `target_downsample_size`.

    Both are in the unit of `resolution_type` (megapixels; N for N*N pixels; the shorter edge). An image at or below the maximum,
    or already at or below the target, keeps its size.
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
    """Why the dataset leaves each image out, naming the key; empty where it does not: an array of str of shape (N,)."""
    ratios = aspect_ratios(heights, widths, dataset.aspect_bucket_rounding)
    reasons: dict[str, np.ndarray] = {
        "smaller than minimum_image_size": _below_minimum(dataset, heights, widths)
    }
    if dataset.minimum_aspect_ratio is not None:
        reasons["narrower than minimum_aspect_ratio"] = ratios < dataset.minimum_aspect_ratio
    if dataset.maximum_aspect_ratio is not None:
        reasons["wider than maximum_aspect_ratio"] = ratios > dataset.maximum_aspect_ratio
    chooses = dataset.crop and dataset.crop_aspect in ("closest", "random")
    square = dataset.crop and dataset.crop_aspect == "square"
    if not chooses:
        bucket_h, bucket_w = bucket_sizes(dataset, np.ones(len(heights)) if square else ratios)
    if dataset.max_upscale_threshold is not None:
        fits: np.ndarray
        if chooses:
            fits = np.asarray(_allowed_aspects(dataset, heights, widths).any(axis=1))
        else:
            fits = _enlarging(heights, widths, bucket_h, bucket_w) <= dataset.max_upscale_threshold
        reasons["needs more enlarging than max_upscale_threshold"] = ~fits
    if not chooses and not square:
        square_h, square_w = _bucket(dataset, 1.0)
        # in floats, since edges of such buckets may be of any length
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
    """Which of `crop_aspect_buckets` each image fills without too much enlarging: bool of shape (N, aspects)."""
    aspects = _listed_aspects(dataset)
    if dataset.max_upscale_threshold is None:
        return np.full((len(heights), len(aspects)), True)
    sizes = np.array([_bucket(dataset, aspect) for aspect in aspects])
    return (
        _enlarging(heights[:, None], widths[:, None], sizes[:, 0], sizes[:, 1])
        <= dataset.max_upscale_threshold
    )


def _enlarging(
    heights: np.ndarray, widths: np.ndarray, bucket_h: np.ndarray, bucket_w: np.ndarray
) -> np.ndarray:
    """By what share the images must grow to cover the buckets."""
    return np.maximum(bucket_h / heights, bucket_w / widths) - 1


def _below_minimum(dataset: ImageDataset, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    if not dataset.minimum_image_size:
        return np.full(len(heights), False)
    threshold = _threshold(dataset.resolution_type, dataset.minimum_image_size)
    below: np.ndarray = _measures(dataset.resolution_type, heights, widths) < threshold
    if dataset.resolution_type != "pixel" and dataset.crop and dataset.crop_aspect == "square":
        # a long narrow image may have the area and yet no square of that area in it
        below |= np.minimum(heights, widths) < math.isqrt(round(threshold))
    return below


def _measures(resolution_type: str, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """What sizes in this unit are compared by: the area, or the shorter edge."""
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
    # in integers, rounding half up: never below the edge it must cover
    return (2 * lengths * numerators + denominators) // (2 * denominators)
