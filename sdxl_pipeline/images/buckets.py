"""Aspect buckets: the size each picture is trained at, and which pictures are not worth training on.

The formula is SimpleTuner's, kept for every aspect: a target area as a square edge rounded to the alignment, spread over the
picture's rounded aspect ratio, each edge rounded again. Sizes are (height, width) in pixels.
"""

import math

from sdxl_pipeline.project.datasets import ImageDataset


def bucket_size(
    width: int, height: int, resolution: float, resolution_type: str, alignment: int = 64, rounding: int = 2
) -> tuple[int, int]:
    """(height, width) of the bucket for a picture of `width` x `height` pixels, both multiples of `alignment`.

    `resolution` is megapixels for `area`; for `pixel_area` an edge N that stands for N*N pixels; for `pixel` the shorter edge.
    The aspect ratio is rounded to `rounding` decimals first, so that pictures of nearly the same shape share a bucket.
    """
    ratio = aspect_ratio(width, height, rounding)
    if resolution_type == "area":
        edge = _round_to_multiple(math.isqrt(round(resolution * 1e6)), alignment)
    else:
        edge = _round_to_multiple(resolution, alignment)
    if resolution_type == "pixel":
        if ratio < 1:
            return _round_to_multiple(edge / ratio, alignment), edge
        return edge, _round_to_multiple(edge * ratio, alignment)
    stretch = math.sqrt(ratio)
    return _round_to_multiple(edge / stretch, alignment), _round_to_multiple(edge * stretch, alignment)


def aspect_ratio(width: int, height: int, rounding: int = 2) -> float:
    """Width over height, rounded; a picture too narrow for that many decimals keeps its own ratio rather than 0."""
    return round(width / height, rounding) or width / height


def dataset_bucket(dataset: ImageDataset, height: int, width: int) -> tuple[int, int]:
    """(height, width) of the bucket that this dataset's settings give a picture: square crops all share one."""
    if takes_square_crops(dataset):
        height = width = 1
    return bucket_size(
        width,
        height,
        dataset.resolution,
        dataset.resolution_type,
        dataset.aspect_bucket_alignment,
        dataset.aspect_bucket_rounding,
    )


def takes_square_crops(dataset: ImageDataset) -> bool:
    """Whether every picture is cropped to a square, whatever its aspect."""
    return dataset.crop and dataset.crop_aspect == "square"


def covering_size(height: int, width: int, bucket_h: int, bucket_w: int) -> tuple[int, int]:
    """The smallest size of the picture's own aspect that covers the bucket: one edge meets it exactly, the other is rounded."""
    if bucket_w * height >= bucket_h * width:
        return _scale(height, bucket_w, width), bucket_w
    return bucket_h, _scale(width, bucket_h, height)


def downsampled_size(dataset: ImageDataset, height: int, width: int) -> tuple[int, int]:
    """The picture's size after `maximum_image_size`: one above it is shrunk, aspect kept, to `target_downsample_size`.

    Both are in the unit of `resolution_type` (megapixels; N for N*N pixels; the shorter edge). A picture at or below the maximum,
    or already at or below the target, keeps its size.
    """
    if dataset.maximum_image_size is None or dataset.target_downsample_size is None:
        return height, width
    measure = _measure(dataset.resolution_type, height, width)
    if measure <= _threshold(dataset.resolution_type, dataset.maximum_image_size):
        return height, width
    scale = _threshold(dataset.resolution_type, dataset.target_downsample_size) / measure
    if dataset.resolution_type != "pixel":
        scale = math.sqrt(scale)
    if scale >= 1:
        return height, width
    return max(round(height * scale), 1), max(round(width * scale), 1)


def filter_reason(dataset: ImageDataset, height: int, width: int) -> str:
    """Why the dataset's filters leave this picture out, naming the key; empty when they let it pass."""
    minimum = dataset.minimum_image_size
    if minimum and _below_minimum(dataset, height, width, minimum):
        return "smaller than minimum_image_size"
    ratio = aspect_ratio(width, height, dataset.aspect_bucket_rounding)
    if dataset.minimum_aspect_ratio is not None and ratio < dataset.minimum_aspect_ratio:
        return "narrower than minimum_aspect_ratio"
    if dataset.maximum_aspect_ratio is not None and ratio > dataset.maximum_aspect_ratio:
        return "wider than maximum_aspect_ratio"
    if dataset.max_upscale_threshold is not None:
        bucket_h, bucket_w = dataset_bucket(dataset, height, width)
        if max(bucket_h / height, bucket_w / width) - 1 > dataset.max_upscale_threshold:
            return "needs more enlarging than max_upscale_threshold"
    return ""


def _below_minimum(dataset: ImageDataset, height: int, width: int, minimum: float) -> bool:
    if _measure(dataset.resolution_type, height, width) < _threshold(dataset.resolution_type, minimum):
        return True
    if dataset.resolution_type == "pixel" or not takes_square_crops(dataset):
        return False
    # a long narrow picture may have the area and yet no square of that area in it
    return min(height, width) < math.isqrt(round(_threshold(dataset.resolution_type, minimum)))


def _measure(resolution_type: str, height: int, width: int) -> float:
    """What sizes in this unit are compared by: the area, or the shorter edge."""
    return min(height, width) if resolution_type == "pixel" else height * width


def _threshold(resolution_type: str, size: float) -> float:
    match resolution_type:
        case "area":
            return size * 1e6
        case "pixel_area":
            return size * size
    return size


def _round_to_multiple(value: float, multiple: int) -> int:
    return max(round(value / multiple) * multiple, multiple)


def _scale(length: int, numerator: int, denominator: int) -> int:
    # in integers, rounding half up: never below the edge it must cover
    return (2 * length * numerator + denominator) // (2 * denominator)
