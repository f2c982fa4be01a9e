"""SDXL's size conditioning: order, precision, and equality with diffusers."""

import pytest
import torch

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_pipeline
from sdxl_pipeline.models.conditioning import time_ids


def test_time_ids_are_height_first_and_exact():
    ids = time_ids([(1820, 4097), (1, 2)], [(3, 1001), (0, 0)], [(1024, 768), (64, 96)])
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[1820, 4097, 3, 1001, 1024, 768], [1, 2, 0, 0, 64, 96]]


def test_time_ids_equal_diffusers(bundled: ResolvedModel):
    pipeline = load_pipeline(bundled, torch.float32)
    expected = pipeline._get_add_time_ids(
        (300, 200), (7, 11), (128, 96), torch.float32, text_encoder_projection_dim=64
    )
    assert torch.equal(time_ids([(300, 200)], [(7, 11)], [(128, 96)]), expected)


def test_time_ids_of_no_images_and_of_uneven_arguments():
    assert time_ids([], [], []).shape == (0, 6)
    with pytest.raises(ValueError, match="zip"):
        time_ids([(1, 1)], [], [(1, 1)])
