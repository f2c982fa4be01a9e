"""Datasets and a photograph for the tests of sdxl_pipeline.data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_pipeline.config.schema.datasets import ImageDataset
from tests.support.photographs import PHOTOGRAPHS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that `make_dataset`'s datasets read."""
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def make_dataset(folder: Path) -> Callable[..., ImageDataset]:
    """Build a dataset over `folder`, at a low resolution by default."""

    def make(**settings: Any) -> ImageDataset:
        defaults = {
            "id": "photos",
            "instance_data_dir": folder,
            "resolution": 256,
            "caption_strategy": "filename",
        }
        return ImageDataset.model_validate(defaults | settings)

    return make


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A real photograph, 320x200, without any symmetry."""
    with Image.open(PHOTOGRAPHS / "astronaut.png") as image:
        return image.convert("RGB").resize((320, 200), Image.Resampling.LANCZOS)
