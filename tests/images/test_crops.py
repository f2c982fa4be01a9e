"""Crops lie inside what they are cut from, depend on nothing but settings, seed and picture, and hold the recorded numbers."""

import hashlib

import pandas as pd
import pytest

from sdxl_pipeline.images.crops import ROW_COLUMNS, Crop, held_out, plan_crop, plan_crops


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def scanned_frame(*pictures: tuple[str, int, int], status: str = "kept") -> pd.DataFrame:
    """A scan of pictures given as (path, height, width)."""
    return pd.DataFrame(
        [
            {"path": path, "key": key_of(path), "height": height, "width": width, "status": status}
            for path, height, width in pictures
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
def test_every_crop_lies_inside_its_resized_picture(
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


def test_full_hd_keeps_its_aspect_and_is_trimmed_in_the_middle(make_dataset):
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


def test_square_crops_are_taken_along_the_longer_edge(make_dataset):
    def left(style: str) -> int:
        return plan_crop(make_dataset(crop=True, crop_style=style), 500, 1000, key_of("a"), seed=0).crop_left

    assert left("corner") == 0
    assert left("center") == 128
    assert 0 <= left("random") <= 256


def test_above_the_maximum_the_crop_is_cut_from_the_downsampled_picture(make_dataset):
    dataset = make_dataset(resolution=1024, crop=True, maximum_image_size=1536, target_downsample_size=1280)
    plan = plan_crop(dataset, 3000, 4000, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1109, 1478)
    assert (plan.bucket_h, plan.bucket_w) == (1024, 1024)
    # at or below the maximum it is cut from its own size
    plan = plan_crop(dataset, 1100, 1200, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1100, 1200)
    # a target too small for the bucket stops at what covers it, and small pictures are enlarged to that
    dataset = make_dataset(resolution=1024, crop=True, maximum_image_size=1536, target_downsample_size=512)
    plan = plan_crop(dataset, 3000, 4000, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (plan.resized_h, plan.resized_w) == (1024, 1365)
    plan = plan_crop(dataset, 300, 400, key_of("a"), seed=0)
    assert (plan.source_h, plan.source_w) == (300, 400)
    assert (plan.resized_h, plan.resized_w) == (1024, 1365)


def test_random_crops_repeat_for_a_seed_and_differ_between_pictures_and_seeds(make_dataset):
    dataset = make_dataset(crop=True)

    def lefts(seed: int) -> list[int]:
        return [plan_crop(dataset, 256, 1256, key_of(str(number)), seed).crop_left for number in range(400)]

    assert lefts(1) == lefts(1)
    assert lefts(1) != lefts(2)
    spread = lefts(1)
    assert len(set(spread)) > 250
    # evenly over 0..1000: the mean of 400 is within four standard errors (14.4 each) of the middle
    assert abs(sum(spread) / 400 - 500) < 58
    assert min(spread) < 25
    assert max(spread) > 975
    # a golden number, so that no later version silently moves every crop of a user's dataset
    assert plan_crop(dataset, 256, 1256, key_of("golden"), seed=42).crop_left == 603


def test_every_offset_can_be_drawn_the_ends_included(make_dataset):
    dataset = make_dataset(crop=True)
    lefts = {plan_crop(dataset, 256, 258, key_of(str(number)), seed=0).crop_left for number in range(60)}
    assert lefts == {0, 1, 2}


def test_the_plan_has_a_row_for_each_picture_and_names_those_left_out(make_dataset):
    pictures = [("a.png", 300, 300), ("b/c.png", 100, 900), ("d.png", 900, 300)]
    scanned = pd.concat([scanned_frame(*pictures), scanned_frame(("bad.png", 0, 0), status="dropped")])
    rows, dropped = plan_crops(
        make_dataset(maximum_aspect_ratio=2), scanned, seed=0, holdout_share=0.0, is_eval=False
    )
    assert tuple(rows.columns) == ROW_COLUMNS
    assert rows["path"].tolist() == ["a.png", "d.png"]
    assert dropped.to_dict("records") == [{"path": "b/c.png", "reason": "wider than maximum_aspect_ratio"}]
    assert set(rows["split"]) == {"train"}
    assert rows["key"].tolist() == [key_of("a.png"), key_of("d.png")]


def test_adding_a_picture_moves_no_other(make_dataset):
    dataset = make_dataset(crop=True)
    pictures = [(f"{number}.png", 300 + number, 700) for number in range(20)]
    before, _ = plan_crops(dataset, scanned_frame(*pictures), 7, 0.2, is_eval=False)
    after, _ = plan_crops(dataset, scanned_frame(("0new.png", 500, 500), *pictures), 7, 0.2, is_eval=False)
    pd.testing.assert_frame_equal(after.iloc[1:].reset_index(drop=True), before)


def test_no_picture_gives_an_empty_plan_that_survives_parquet(make_dataset, tmp_path):
    rows, dropped = plan_crops(
        make_dataset(minimum_image_size=9999), scanned_frame(("a.png", 9, 9)), 0, 0.1, is_eval=False
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(back) == 0
    assert tuple(back.columns) == ROW_COLUMNS
    assert back["bucket_h"].dtype == "int64"
    assert dropped["reason"].tolist() == ["smaller than minimum_image_size"]


def test_held_out_pictures_stay_held_out():
    keys = [key_of(str(number)) for number in range(4000)]
    tenth = {key for key in keys if held_out(key, 0.1)}
    fifth = {key for key in keys if held_out(key, 0.2)}
    assert 320 < len(tenth) < 480  # four standard deviations of 19
    assert tenth < fifth
    assert not any(held_out(key, 0.0) for key in keys)
    assert all(held_out(key, 1.0) for key in keys)


def test_splits(make_dataset):
    pictures = scanned_frame(*[(f"{number}.png", 300, 300) for number in range(50)])
    rows, _ = plan_crops(make_dataset(), pictures, seed=0, holdout_share=0.2, is_eval=False)
    assert rows["split"].tolist() == ["eval" if held_out(key, 0.2) else "train" for key in rows["key"]]
    assert set(rows["split"]) == {"train", "eval"}
    rows, _ = plan_crops(make_dataset(), pictures, seed=0, holdout_share=0.0, is_eval=True)
    assert set(rows["split"]) == {"eval"}
