"""Tests of the crop plan: valid windows, dependence only on settings, seed and image, and golden values."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from sdxl_pipeline.data.buckets.crop_plan import (
    ROW_COLUMNS,
    Crop,
    crop_offset,
    images_per_bucket,
    plan_crop,
    plan_crops,
)


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def scan_of(*images: tuple[str, int, int], status: str = "kept") -> pd.DataFrame:
    """Return a scan of images given as (path, height, width)."""
    return pd.DataFrame(
        [
            {"path": path, "key": key_of(path), "height": height, "width": width, "status": status}
            for path, height, width in images
        ]
    )


SIZES = [
    (1, 1),
    (10, 3000),
    (256, 256),
    (257, 255),
    (300, 777),
    (1080, 1920),
    (1920, 1080),
    (4000, 6000),
    (64, 4000),
]


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("crop_aspect", ["square", "preserve"])
@pytest.mark.parametrize("crop_style", ["random", "center", "corner"])
@pytest.mark.parametrize("sizes", [{}, {"maximum_image_size": 600, "target_downsample_size": 300}])
@pytest.mark.parametrize("resolution_type", ["pixel_area", "pixel"])
def test_plan_crop_any_size_window_is_inside_resized_image(
    make_dataset, crop, crop_aspect, crop_style, sizes, resolution_type
):
    dataset = make_dataset(
        crop=crop, crop_aspect=crop_aspect, crop_style=crop_style, resolution_type=resolution_type, **sizes
    )
    for height, width in SIZES:
        plan = plan_crop(dataset, height, width, key_of(f"{height}"), seed=3)
        assert 0 <= plan.crop_top <= plan.resized_h - plan.bucket_h
        assert 0 <= plan.crop_left <= plan.resized_w - plan.bucket_w
        assert (plan.original_h, plan.original_w) == (height, width)
        assert plan.source_h <= height
        assert plan.source_w <= width
        # the aspect is kept to the pixel
        assert abs(plan.resized_w * height - plan.resized_h * width) <= max(height, width)
        if crop and crop_aspect == "square":
            assert plan.bucket_h == plan.bucket_w == 256
        if not crop:
            assert plan.resized_h == plan.bucket_h or plan.resized_w == plan.bucket_w


def test_plan_crop_without_cropping_trims_equally(make_dataset):
    plan = plan_crop(make_dataset(resolution=1024, crop=False), 1080, 1920, key_of("a"), seed=0)
    assert plan == Crop(
        bucket_h=768,
        bucket_w=1344,
        resized_h=768,
        resized_w=1365,
        crop_top=0,
        crop_left=10,
        original_h=1080,
        original_w=1920,
        source_h=1080,
        source_w=1920,
    )


def test_plan_crop_styles_position_square_on_longer_edge(make_dataset):
    def left(style: str) -> int:
        return plan_crop(make_dataset(crop=True, crop_style=style), 500, 1000, key_of("a"), seed=0).crop_left

    assert left("corner") == 0
    assert left("center") == 128
    assert 0 <= left("random") <= 256


def test_plan_crop_above_maximum_uses_downsampled_size(make_dataset):
    dataset = make_dataset(resolution=1024, crop=True, maximum_image_size=1536, target_downsample_size=1280)
    plan = plan_crop(dataset, 3000, 4000, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1109, 1478)
    assert (plan.bucket_h, plan.bucket_w) == (1024, 1024)
    # at or below the maximum the crop is cut from the image's own size
    plan = plan_crop(dataset, 1100, 1200, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1100, 1200)
    # a target too small for the bucket is raised to the covering size, to which small images are enlarged too
    dataset = make_dataset(resolution=1024, crop=True, maximum_image_size=1536, target_downsample_size=512)
    plan = plan_crop(dataset, 3000, 4000, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1024, 1365)
    plan = plan_crop(dataset, 300, 400, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (300, 400)
    assert (plan.resized_h, plan.resized_w) == (1024, 1365)


def test_plan_crop_random_style_is_deterministic_and_uniform(make_dataset):
    dataset = make_dataset(crop=True)

    def lefts(seed: int) -> list[int]:
        return [plan_crop(dataset, 256, 1256, key_of(str(number)), seed).crop_left for number in range(400)]

    assert lefts(1) == lefts(1)
    assert lefts(1) != lefts(2)
    spread = lefts(1)
    assert len(set(spread)) > 250
    # uniform over 0..1000: the mean of 400 is within four standard errors (14.4 each) of 500
    assert abs(sum(spread) / 400 - 500) < 58
    assert min(spread) < 25
    assert max(spread) > 975
    # golden value, so that no later version moves the crops of a user's dataset
    assert plan_crop(dataset, 256, 1256, key_of("golden"), seed=42).crop_left == 603


def test_plan_crop_random_style_covers_all_offsets(make_dataset):
    dataset = make_dataset(crop=True)
    lefts = {plan_crop(dataset, 256, 258, key_of(str(number)), seed=0).crop_left for number in range(60)}
    assert lefts == {0, 1, 2}


def test_plan_crops_filtered_images_are_in_dropped(make_dataset):
    images = [("a.png", 300, 300), ("b/c.png", 100, 900), ("d.png", 900, 300)]
    scanned = pd.concat([scan_of(*images), scan_of(("bad.png", 0, 0), status="dropped")])
    rows, dropped = plan_crops(
        make_dataset(maximum_aspect_ratio=2), scanned, seed=0, held_out=(), is_eval=False
    )
    assert tuple(rows.columns) == ROW_COLUMNS
    assert rows["path"].tolist() == ["a.png", "d.png"]
    assert dropped.to_dict("records") == [{"path": "b/c.png", "reason": "wider than maximum_aspect_ratio"}]
    assert set(rows["split"]) == {"train"}
    assert rows["key"].tolist() == [key_of("a.png"), key_of("d.png")]


def test_plan_crops_added_image_changes_no_other_row(make_dataset):
    dataset = make_dataset(crop=True)
    images = [(f"{number}.png", 300 + number, 700) for number in range(20)]
    held_out = {key_of("3.png"), key_of("7.png")}
    before, _ = plan_crops(dataset, scan_of(*images), 7, held_out, is_eval=False)
    after, _ = plan_crops(dataset, scan_of(("0new.png", 500, 500), *images), 7, held_out, is_eval=False)
    pd.testing.assert_frame_equal(after.iloc[1:].reset_index(drop=True), before)


def test_plan_crops_no_image_gives_empty_typed_frame(make_dataset, tmp_path):
    rows, dropped = plan_crops(
        make_dataset(minimum_image_size=9999), scan_of(("a.png", 9, 9)), 0, (), is_eval=False
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(back) == 0
    assert tuple(back.columns) == ROW_COLUMNS
    assert back["bucket_h"].dtype == "int64"
    assert dropped["reason"].tolist() == ["smaller than minimum_image_size"]


def test_plan_crops_held_out_keys_are_eval(make_dataset):
    images = scan_of(*[(f"{number}.png", 300, 300) for number in range(50)])
    held_out = {key_of("4.png"), key_of("40.png"), "of no file"}
    rows, _ = plan_crops(make_dataset(), images, 0, held_out, is_eval=False)
    assert rows["path"][rows["split"] == "eval"].tolist() == ["4.png", "40.png"]
    assert set(rows["split"]) == {"train", "eval"}
    rows, _ = plan_crops(make_dataset(), images, seed=0, held_out=(), is_eval=True)
    assert set(rows["split"]) == {"eval"}


LISTED_ASPECTS = {"crop": True, "crop_aspect_buckets": (1.0, 0.5, 2.0)}


def aspects_of(rows: pd.DataFrame) -> list[float]:
    """Return the listed aspect of each crop, by its bucket at 256 pixels: 256x256, 384x192 and 192x384 (2:1)."""
    return [{(256, 256): 1.0, (384, 192): 0.5, (192, 384): 2.0}[s] for s in bucket_sizes_of(rows)]


def bucket_sizes_of(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(rows["bucket_h"].tolist(), rows["bucket_w"].tolist(), strict=True))


def plan(dataset, *images, seed=0, held_out=(), is_eval=False):
    return plan_crops(dataset, scan_of(*images), seed, held_out, is_eval)


def test_plan_crops_closest_aspect_crops_least(make_dataset):
    dataset = make_dataset(crop_aspect="closest", **LISTED_ASPECTS)
    # 1.4 loses 29 % as a square and 30 % as 2:1, 1.43 the other way round; likewise in portrait
    images = [("a", 1000, 1400), ("b", 1000, 1430), ("c", 1400, 1000), ("d", 1430, 1000), ("e", 100, 2000)]
    rows, dropped = plan(dataset, *images)
    assert aspects_of(rows) == [1.0, 2.0, 1.0, 0.5, 2.0]
    assert dropped.empty


def test_plan_crops_closest_aspect_respects_max_upscale_threshold(make_dataset):
    dataset = make_dataset(crop_aspect="closest", max_upscale_threshold=0.0, **LISTED_ASPECTS)
    rows, dropped = plan(
        dataset, ("wide", 200, 300), ("fits", 256, 260), ("tiny", 90, 90), ("tall", 300, 200)
    )
    # 200x300 is smaller than a square of 256; both long images are shorter than 384
    assert dropped["path"].tolist() == ["wide", "tiny", "tall"]
    assert set(dropped["reason"]) == {"needs more enlarging than max_upscale_threshold"}
    assert aspects_of(rows) == [1.0]
    rows, _ = plan(dataset, ("flat", 200, 420))
    assert aspects_of(rows) == [2.0]


def test_plan_crops_random_aspects_follow_weights_and_threshold(make_dataset):
    dataset = make_dataset(crop_aspect="random", crop_aspect_weights=(6, 1, 3), **LISTED_ASPECTS)
    images = [(f"{number}", 900, 900) for number in range(1000)]
    rows, _ = plan(dataset, *images)
    aspects = aspects_of(rows)
    # four standard deviations of 15.5, 9.5 and 14.5
    assert abs(aspects.count(1.0) - 600) < 62
    assert abs(aspects.count(0.5) - 100) < 38
    assert abs(aspects.count(2.0) - 300) < 58
    assert aspects[:12] == [1.0, 1.0, 2.0, 1.0, 0.5, 2.0, 1.0, 0.5, 1.0, 2.0, 2.0, 2.0]  # golden
    again, _ = plan(dataset, *reversed(images))
    assert aspects_of(again)[::-1] == aspects
    assert aspects_of(plan(dataset, *images, seed=1)[0]) != aspects
    limited = make_dataset(
        crop_aspect="random", crop_aspect_weights=(6, 1, 3), max_upscale_threshold=0.0, **LISTED_ASPECTS
    )
    rows, _ = plan(limited, *[(f"{number}", 260, 400) for number in range(400)])
    limited_aspects = aspects_of(rows)
    assert set(limited_aspects) == {1.0, 2.0}
    assert abs(limited_aspects.count(1.0) - 267) < 38  # two to one


def test_plan_crops_several_crops_are_distinct(make_dataset):
    dataset = make_dataset(crop=True, crops_per_image=4)
    rows, _ = plan(dataset, ("wide", 256, 900), ("hardly", 256, 258), ("square", 500, 500))
    by_path = dict(iter(rows.groupby("path", sort=False)))
    assert rows["path"].tolist() == sorted(rows["path"], key=["wide", "hardly", "square"].index)
    assert by_path["wide"]["crop_left"].nunique() == 4
    assert len(by_path["square"]) == 1  # no slack, so that all four crops are equal
    assert by_path["hardly"]["crop_left"].is_unique
    assert len(by_path["hardly"]) < 4  # there are only three offsets
    for group in by_path.values():
        assert group["crop_index"].tolist() == list(range(len(group)))
    # the first crop equals that of a plan with one crop per image
    one, _ = plan(make_dataset(crop=True), ("wide", 256, 900))
    pd.testing.assert_frame_equal(by_path["wide"].iloc[:1], one)
    for settings in ({"crop_style": "center"}, {"crop_style": "corner"}, {"crop": False}):
        fixed, _ = plan(make_dataset(**{"crop": True, "crops_per_image": 4} | settings), ("wide", 256, 900))
        assert len(fixed) == 1


def test_plan_crops_random_flip_adds_mirrored_rows(make_dataset):
    images = [(f"{number}", 256, 700) for number in range(400)]
    straight, _ = plan(make_dataset(crop=True, crops_per_image=2), *images)
    both, _ = plan(make_dataset(crop=True, crops_per_image=2, random_flip=True), *images)
    assert not straight["flipped"].any()
    assert len(both) == 2 * len(straight)
    unmirrored = both[~both["flipped"]].drop(columns="crop_index").reset_index(drop=True)
    pd.testing.assert_frame_equal(unmirrored, straight.drop(columns="crop_index"))
    mirrored = both[both["flipped"]].reset_index(drop=True)
    assert (mirrored["crop_left"] == 700 - 256 - unmirrored["crop_left"]).all()
    others = ["path", "bucket_h", "bucket_w", "resized_h", "resized_w", "crop_top", "split"]
    pd.testing.assert_frame_equal(mirrored[others], unmirrored[others])
    assert (both["flipped"] == (both["crop_index"] % 2 == 1)).all()
    assert (both.groupby("path")["crop_index"].max() == both.groupby("path").size() - 1).all()


def test_plan_crops_eval_images_have_one_unflipped_crop(make_dataset):
    dataset = make_dataset(crop=True, crops_per_image=3, random_flip=True)
    images = [(f"{number}", 256, 700) for number in range(60)]
    measured, _ = plan(dataset, *images, is_eval=True)
    assert len(measured) == 60
    assert not measured["flipped"].any()
    rows, _ = plan(dataset, *images, held_out=[key_of(str(number)) for number in range(30)])
    sizes = rows.groupby(["split", "path"]).size()
    assert set(sizes["eval"]) == {1}
    assert set(sizes["train"]) == {6}
    # the crop equals that of an eval dataset
    limited_aspects = rows[rows["split"] == "eval"].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        limited_aspects, measured[measured["path"].isin(limited_aspects["path"])].reset_index(drop=True)
    )


def test_crop_offset_equal_name_matches_plan(make_dataset):
    key = key_of("a")
    planned = plan_crop(make_dataset(crop=True), 300, 1000, key, seed=5, crop_index=2)
    slack = (planned.resized_h - planned.bucket_h, planned.resized_w - planned.bucket_w)
    assert crop_offset("random", *slack, 5, key, "2") == (planned.crop_top, planned.crop_left)
    offsets = {crop_offset("random", 40, 1000, 5, key, f"epoch {epoch}") for epoch in range(50)}
    assert len(offsets) > 45
    assert all(0 <= top <= 40 and 0 <= left <= 1000 for top, left in offsets)
    assert crop_offset("center", 41, 10, 5, key, "x") == (20, 5)
    assert crop_offset("corner", 41, 10, 5, key, "x") == (0, 0)
    with pytest.raises(ValueError, match="face"):
        crop_offset("face", 41, 10, 5, key, "x")


def expected_offset(key: str, seed: int, draw: int, slack_h: int, slack_w: int) -> tuple[int, int]:
    digest = hashlib.sha256(f"crop/{seed}/{key}/{draw}".encode()).digest()
    values = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
    return values[0] * (slack_h + 1) // 2**64, values[1] * (slack_w + 1) // 2**64


def expected_plan(dataset, height: int, width: int, key: str, seed: int) -> dict[str, int]:
    """Return the plan of one image in exact arithmetic, as a reference for the vectorized plan."""
    square = dataset.crop and dataset.crop_aspect == "square"
    ratio = 1.0 if square else round(width / height, dataset.aspect_bucket_rounding) or width / height
    unit = dataset.aspect_bucket_alignment

    def aligned(length: float) -> int:
        return max(round(length / unit) * unit, unit)

    edge = aligned(
        math.isqrt(round(dataset.resolution * 1e6))
        if dataset.resolution_type == "area"
        else dataset.resolution
    )
    if dataset.resolution_type == "pixel":
        bucket_h, bucket_w = (aligned(edge / ratio), edge) if ratio < 1 else (edge, aligned(edge * ratio))
    else:
        bucket_h, bucket_w = aligned(edge / math.sqrt(ratio)), aligned(edge * math.sqrt(ratio))
    scale = max(Fraction(bucket_h, height), Fraction(bucket_w, width))
    resized_h, resized_w = (
        max(bucket, math.floor(edge * scale + Fraction(1, 2)))
        for edge, bucket in ((height, bucket_h), (width, bucket_w))
    )
    source_h, source_w = height, width
    if dataset.maximum_image_size:
        pixel = dataset.resolution_type == "pixel"
        measure = min(height, width) if pixel else height * width
        unit_size = {"area": lambda m: m * 1e6, "pixel_area": lambda m: m * m, "pixel": lambda m: m}
        maximum, target = (
            unit_size[dataset.resolution_type](size)
            for size in (dataset.maximum_image_size, dataset.target_downsample_size)
        )
        if measure > maximum > target:
            shrink = target / measure if pixel else math.sqrt(target / measure)
            source_h, source_w = max(round(height * shrink), 1), max(round(width * shrink), 1)
        if source_h < bucket_h or source_w < bucket_w:
            source_h, source_w = min(height, resized_h), min(width, resized_w)
        if dataset.crop and source_h >= bucket_h and source_w >= bucket_w:
            resized_h, resized_w = source_h, source_w
    slack_h, slack_w = resized_h - bucket_h, resized_w - bucket_w
    top, left = slack_h // 2, slack_w // 2
    if dataset.crop and dataset.crop_style == "random":
        top, left = expected_offset(key, seed, 0, slack_h, slack_w)
    return {
        "bucket_h": bucket_h,
        "bucket_w": bucket_w,
        "resized_h": resized_h,
        "resized_w": resized_w,
        "crop_top": top,
        "crop_left": left,
        "original_h": height,
        "original_w": width,
        "source_h": source_h,
        "source_w": source_w,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": True, "resolution": 1024},
        {"crop": True, "crop_aspect": "preserve", "resolution": 1.0, "resolution_type": "area"},
        {"resolution": 512, "resolution_type": "pixel", "aspect_bucket_alignment": 8},
        {"crop": True, "crop_style": "center", "aspect_bucket_rounding": 1},
        {
            "crop": True,
            "resolution": 512,
            "maximum_image_size": 1024,
            "target_downsample_size": 768,
            "crop_aspect": "preserve",
        },
        {
            "crop": True,
            "resolution": 0.25,
            "resolution_type": "area",
            "maximum_image_size": 1.5,
            "target_downsample_size": 0.5,
        },
        {
            "crop": True,
            "resolution": 512,
            "resolution_type": "pixel",
            "maximum_image_size": 900,
            "target_downsample_size": 700,
        },
    ],
)
def test_plan_crops_vectorized_matches_scalar_reference(make_dataset, settings, monkeypatch):
    dataset = make_dataset(**settings)
    random = np.random.default_rng(0)
    edges = np.concatenate([random.integers(1, 7000, 300), random.integers(1, 130, 40), [1, 20000, 65536]])
    images = [
        (f"{number}", int(height), int(width))
        for number, (height, width) in enumerate(zip(edges, random.permutation(edges), strict=True))
    ]
    monkeypatch.setattr("sdxl_pipeline.data.buckets.crop_plan._IMAGES_PER_CHUNK", 100)
    rows, dropped = plan(dataset, *images, seed=9)
    assert len(rows) + len(dropped) == len(images)
    assert set(dropped["reason"]) <= {"too long and narrow for a bucket of its own aspect"}
    sizes = {path: (height, width) for path, height, width in images}
    expected = [
        expected_plan(dataset, *sizes[path], key, 9)
        for path, key in zip(rows["path"], rows["key"], strict=True)
    ]
    pd.testing.assert_frame_equal(rows[list(expected[0])], pd.DataFrame(expected))


def test_plan_crop_offsets_beyond_32_bits_are_exact(make_dataset):
    # a square crop of 1 x 4,000,000 pixels, enlarged 1024 times
    planned = plan_crop(make_dataset(crop=True, resolution=1024), 1, 4_000_000, "key", seed=0)
    assert planned.resized_w == 4_096_000_000
    assert (planned.crop_top, planned.crop_left) == expected_offset("key", 0, 0, 0, 4_096_000_000 - 1024)


def test_images_per_bucket_counts_train_images(make_dataset):
    dataset = make_dataset(crop_aspect="random", crops_per_image=5, random_flip=True, **LISTED_ASPECTS)
    images = [(f"{number}", 900, 900) for number in range(30)]
    rows, _ = plan(dataset, *images, held_out=[key_of(str(number)) for number in range(9)])
    train = rows[rows["split"] == "train"]
    counts = images_per_bucket(rows)
    assert dict(counts) == {
        size: len({row.path for row in train.itertuples() if (row.bucket_h, row.bucket_w) == size})
        for size in set(bucket_sizes_of(train))
    }
    assert max(counts) <= train["path"].nunique() < len(train) / 6
    rows, _ = plan(make_dataset(), ("a", 256, 256), ("b", 256, 256), ("c", 256, 512))
    assert dict(images_per_bucket(rows)) == {(256, 256): 2, (192, 384): 1}
