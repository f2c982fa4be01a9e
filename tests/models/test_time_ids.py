"""Holds SDXL's size conditioning: order, precision, and agreement with diffusers."""

import pytest
import torch

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_pipeline
from sdxl_pipeline.models.time_ids import time_ids


def test_height_comes_first_and_no_pixel_is_rounded():
    ids = time_ids([(1820, 4097), (1, 2)], [(3, 1001), (0, 0)], [(1024, 768), (64, 96)])
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[1820, 4097, 3, 1001, 1024, 768], [1, 2, 0, 0, 64, 96]]


def test_as_diffusers_makes_them(bundled: ResolvedModel):
    pipeline = load_pipeline(bundled, torch.float32)
    theirs = pipeline._get_add_time_ids(
        (300, 200), (7, 11), (128, 96), torch.float32, text_encoder_projection_dim=64
    )
    assert torch.equal(time_ids([(300, 200)], [(7, 11)], [(128, 96)]), theirs)


def test_no_images_and_uneven_ones():
    assert time_ids([], [], []).shape == (0, 6)
    with pytest.raises(ValueError, match="zip"):
        time_ids([(1, 1)], [], [(1, 1)])
