"""Tests of bucket sizes against SimpleTuner's values, covering sizes, and the reason of each filter."""

import itertools

import numpy as np
import pytest

from sdxl_pipeline.data.buckets.bucket_sizes import (
    aspect_ratios,
    bucket_size,
    covering_sizes,
    downsampled_sizes,
    filter_reasons,
)


def bucket_of(width, height, resolution, resolution_type, alignment=64, rounding=2):
    (aspect,) = aspect_ratios(np.array([height]), np.array([width]), rounding)
    return bucket_size(aspect, resolution, resolution_type, alignment)


def reasons_of(dataset, *sizes):
    """Return the filters' reasons for images given as (height, width)."""
    heights, widths = np.array(sizes).T
    return filter_reasons(dataset, heights, widths).tolist()


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 1000, (1024, 1024)),
        (1920, 1080, (768, 1344)),
        (1080, 1920, (1344, 768)),
        (1500, 1000, (832, 1280)),
        (4000, 3000, (896, 1152)),
        (3000, 4000, (1152, 896)),
        (4000, 1000, (512, 2048)),
    ],
)
def test_bucket_size_one_megapixel_matches_simpletuner(width, height, expected):
    assert bucket_of(width, height, 1.0, "area") == expected
    assert bucket_of(width, height, 1024, "pixel_area") == expected


@pytest.mark.parametrize(
    ("resolution", "resolution_type", "alignment", "size", "expected"),
    [
        (
            0.5,
            "area",
            64,
            (1000, 1000),
            (704, 704),
        ),  # squares use the general formula, which does not give 768
        (128, "pixel_area", 8, (1500, 1000), (104, 160)),
        (128, "pixel_area", 16, (1920, 1080), (96, 176)),
        (512, "pixel", 64, (1920, 1080), (512, 896)),
        (512, "pixel", 64, (1080, 1920), (896, 512)),
        (500, "pixel", 8, (1000, 1000), (496, 496)),  # a tie goes to the even multiple, as in the reference
        (16, "pixel_area", 64, (1000, 1000), (64, 64)),  # never below the alignment
    ],
)
def test_bucket_size_units_and_alignments_are_applied(resolution, resolution_type, alignment, size, expected):
    assert bucket_of(*size, resolution, resolution_type, alignment) == expected


def test_bucket_size_similar_aspects_share_a_bucket():
    sizes = {bucket_of(width, 1000, 1.0, "area", 8, 1) for width in range(1455, 1545)}
    assert len(sizes) == 1
    assert len({bucket_of(width, 1000, 1.0, "area", 8, 4) for width in range(1455, 1545)}) > 1


def test_bucket_size_aspect_below_rounding_is_not_zero():
    height, width = bucket_of(3, 9000, 1.0, "area")
    assert width == 64
    assert height > 9000


EDGES = (1, 2, 63, 64, 65, 127, 333, 500, 767, 1000, 1080, 1365, 1920, 3999, 6000)


@pytest.mark.parametrize("resolution_type", ["area", "pixel_area", "pixel"])
@pytest.mark.parametrize("alignment", [8, 24, 64])
def test_covering_sizes_cover_bucket_and_keep_aspect(resolution_type, alignment):
    resolution = 0.26 if resolution_type == "area" else 512
    for height, width in itertools.product(EDGES, EDGES):
        bucket_h, bucket_w = bucket_of(width, height, resolution, resolution_type, alignment)
        assert bucket_h % alignment == bucket_w % alignment == 0
        resized_h, resized_w = covering_sizes(height, width, bucket_h, bucket_w)
        assert resized_h >= bucket_h
        assert resized_w >= bucket_w
        assert resized_h == bucket_h or resized_w == bucket_w
        # the rounded edge is within half a pixel of the true one
        scale = max(bucket_h / height, bucket_w / width)
        assert abs(resized_h - height * scale) <= 0.5 + 1e-6 * resized_h
        assert abs(resized_w - width * scale) <= 0.5 + 1e-6 * resized_w


def test_covering_sizes_full_hd_matches_simpletuner():
    assert covering_sizes(1080, 1920, 768, 1344) == (768, 1365)


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({"minimum_image_size": 512}, [(512, 512), (256, 1024)], [(511, 512)]),
        ({"minimum_image_size": 512, "crop": True}, [(512, 512)], [(256, 1024), (511, 1000)]),
        ({"minimum_image_size": 512, "crop": True, "crop_aspect": "preserve"}, [(256, 1024)], [(511, 512)]),
        (
            {"minimum_image_size": 0.25, "resolution": 1.0, "resolution_type": "area"},
            [(500, 500), (250, 1000)],
            [(499, 500)],
        ),
        (
            {"minimum_image_size": 0.5, "resolution": 1.0, "resolution_type": "area", "crop": True},
            [(707, 708)],
            [(706, 900)],
        ),
        (
            {"minimum_image_size": 512, "resolution_type": "pixel"},
            [(512, 512), (512, 4000)],
            [(511, 4000), (4000, 511)],
        ),
    ],
)
def test_filter_reasons_minimum_image_size_drops_smaller_images(make_dataset, settings, kept, dropped):
    dataset = make_dataset(**settings)
    assert reasons_of(dataset, *kept) == [""] * len(kept)
    assert reasons_of(dataset, *dropped) == ["smaller than minimum_image_size"] * len(dropped)


def test_filter_reasons_aspect_limits_drop_outliers(make_dataset):
    dataset = make_dataset(minimum_aspect_ratio=0.5, maximum_aspect_ratio=2.0)
    assert reasons_of(dataset, (1000, 500), (500, 1000), (1000, 490), (490, 1000)) == [
        "",
        "",
        "narrower than minimum_aspect_ratio",
        "wider than maximum_aspect_ratio",
    ]


def test_filter_reasons_max_upscale_threshold_drops_small_images(make_dataset):
    dataset = make_dataset(resolution=1024, max_upscale_threshold=0.25)
    # 1024 / 820 is 24.9 % more
    assert reasons_of(dataset, (820, 820), (818, 818)) == [
        "",
        "needs more enlarging than max_upscale_threshold",
    ]


@pytest.mark.parametrize("crop_aspect", ["closest", "random"])
def test_filter_reasons_no_listed_aspect_within_threshold_drops_image(make_dataset, crop_aspect):
    dataset = make_dataset(
        resolution=1024,
        crop=True,
        crop_aspect=crop_aspect,
        crop_aspect_buckets=(1.0, 0.5, 2.0),
        max_upscale_threshold=0.2,
    )
    # the last one is too small for the square, 1024 x 1024, but not for 704 x 1472, the bucket of 2.0
    reason = "needs more enlarging than max_upscale_threshold"
    assert reasons_of(dataset, (256, 256), (860, 860), (600, 1300)) == [reason, "", ""]


def test_filter_reasons_extreme_aspect_drops_image(make_dataset):
    reason = "too long and narrow for a bucket of its own aspect"
    dataset = make_dataset(resolution=1024)
    assert reasons_of(dataset, (1, 20000), (20000, 1), (10, 20000), (60, 4000)) == [reason, reason, "", ""]
    assert reasons_of(make_dataset(resolution=512, resolution_type="pixel"), (100, 900)) == [reason]
    # a square crop fits into any image
    assert reasons_of(make_dataset(resolution=1024, crop=True), (1, 20000)) == [""]


@pytest.mark.parametrize("rounding", [1, 2, 3, 9])
def test_aspect_ratios_round_like_python(rounding):
    random = np.random.default_rng(rounding)
    edges = np.concatenate([random.integers(1, 9000, 20000), 2 ** random.integers(0, 14, 4000)])
    heights, widths = edges, random.permutation(edges)
    # ties and values next to them: 1.005 is below one, 1.125 is one
    heights = np.concatenate([heights, [1000, 8, 200, 1, 20000, 89_000_000]])
    widths = np.concatenate([widths, [1005, 9, 203, 20000, 1, 1]])
    expected = [
        round(w / h, rounding) or w / h for h, w in zip(heights.tolist(), widths.tolist(), strict=True)
    ]
    assert aspect_ratios(heights, widths, rounding).tolist() == expected


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        # the documented example: above 1536*1536, to an area of about 1280*1280
        ({"maximum_image_size": 1536, "target_downsample_size": 1280}, (3000, 4000), (1109, 1478)),
        ({"maximum_image_size": 1536, "target_downsample_size": 1280}, (1536, 1536), (1536, 1536)),
        (
            {
                "maximum_image_size": 4.0,
                "target_downsample_size": 1.0,
                "resolution_type": "area",
                "resolution": 0.5,
            },
            (2500, 2500),
            (1000, 1000),
        ),
        (
            {"maximum_image_size": 1536, "target_downsample_size": 1280, "resolution_type": "pixel"},
            (2000, 3000),
            (1280, 1920),
        ),
        (
            {"maximum_image_size": 1536, "target_downsample_size": 1280, "resolution_type": "pixel"},
            (1500, 9000),
            (1500, 9000),
        ),
        ({}, (5000, 5000), (5000, 5000)),
    ],
)
def test_downsampled_sizes_above_maximum_are_reduced_to_target(make_dataset, settings, size, expected):
    heights, widths = downsampled_sizes(make_dataset(**settings), np.array([size[0]]), np.array([size[1]]))
    assert (heights.item(), widths.item()) == expected
