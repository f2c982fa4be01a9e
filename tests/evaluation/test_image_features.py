"""Correlation finds copies through flips and crops, and training images are read once per content."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_pipeline.evaluation.image_features import (
    LUMA_EDGE,
    SourceImage,
    correlation,
    cosine,
    grey_pixels,
    measure_features,
    read_images,
)
from sdxl_pipeline.training.data.samples import load_samples
from tests.support.training_datasets import make_dataset


def noise(seed: int, size: int = LUMA_EDGE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def source(*crops: np.ndarray, name: str = "a.png") -> SourceImage:
    return SourceImage("shapes", name, Path(name), crops)


def test_correlation_equals_pearson_of_grey_values():
    first, second = noise(0), noise(1)
    grey = [np.asarray(Image.fromarray(image).convert("L"), float) for image in (first, second)]
    direct = np.corrcoef(grey[0].ravel(), grey[1].ravel())[0, 1]
    mirrored = np.corrcoef(grey[0][:, ::-1].ravel(), grey[1].ravel())[0, 1]
    features = [measure_features([source(image)], None) for image in (first, second)]
    assert correlation(*features)[0, 0] == pytest.approx(max(direct, mirrored), abs=1e-5)
    assert cosine(*features) is None


def test_correlation_of_mirrored_image_and_of_any_crop_is_1():
    crops = noise(2), noise(3)
    references = measure_features([source(noise(4)), source(*crops), source(noise(5))], None)
    for copied in (crops[1], crops[0][:, ::-1], 255 - (255 - crops[1]) // 2):
        values = correlation(measure_features([source(np.ascontiguousarray(copied))], None), references)
        assert values.argmax() == 1
        assert values[0, 1] > 0.99
        assert np.abs(values[0, [0, 2]]).max() < 0.2


def test_correlation_of_image_of_one_colour_is_0():
    assert not grey_pixels(np.full((30, 40, 3), 77, np.uint8)).any()
    flat = measure_features([source(np.zeros((30, 40, 3), np.uint8))], None)
    assert correlation(flat, measure_features([source(noise(0))], None)).tolist() == [[0.0]]


def test_read_images_yields_each_content_once_and_skips_missing_files(tmp_path: Path):
    dataset = make_dataset(tmp_path, buckets=((64, 64), (64, 96), (64, 64)), crops=2)
    (tmp_path / "images").mkdir()
    for number, width in ((0, 192), (1, 288)):
        pixels = np.random.default_rng(number).integers(0, 256, (204, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"image_{number:02d}.png")
    images = list(read_images(load_samples([dataset], "train"), [dataset]))
    assert {image.name for image in images} == {"image_00.png", "image_01.png"}
    for image in images:
        plain, mirrored = image.crops
        assert np.array_equal(plain, mirrored[:, ::-1])
    features = measure_features(images, None)
    assert features.first_crops.tolist() == [0, 2]
    assert (len(features), len(features.luma)) == (2, 4)
