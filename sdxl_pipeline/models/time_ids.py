"""SDXL's size and crop conditioning (Podell et al. 2023, section 2.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def time_ids(
    original_hw: Sequence[tuple[int, int]],
    crop_top_left: Sequence[tuple[int, int]],
    target_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """`[original_h, original_w, crop_top, crop_left, target_h, target_w]` per image, in pixels: (B, 6) float32.

    float32 whatever the model's precision: bf16 has 8 significant bits, so 1820 would become 1824. The UNet casts them itself, after
    its sinusoidal embedding. Raises ValueError when the three are not of one length.
    """
    rows = [
        (*original, *top_left, *target)
        for original, top_left, target in zip(original_hw, crop_top_left, target_hw, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
