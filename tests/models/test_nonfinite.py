"""Diagnosis of encoders that give NaN: broken weights first, then the precision, then the input."""

import pytest
import torch

from sdxl_pipeline.cache.encode.encoders import explain_embeds
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders
from sdxl_pipeline.runtime.stage_runner import UserError


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("fp16", "Set mixed_precision to bf16 or no."),
        ("bf16", "Set mixed_precision to no."),
        ("fp32", "change this caption, or set another base model"),
    ],
)
def test_explain_embeds_hint_depends_on_the_dtype(bundled: ResolvedModel, dtype: str, hint: str):
    encoders = load_text_encoders(bundled, torch.float32)
    reason = explain_embeds(encoders, dtype, bundled, "a red star")
    assert hint in reason
    assert "'a red star'" in reason


def test_explain_embeds_with_a_non_finite_weight_raises(bundled: ResolvedModel):
    encoders = load_text_encoders(bundled, torch.float32)
    next(encoders.text_encoder_2.parameters()).data[0] = torch.inf
    with pytest.raises(UserError, match=r"text encoder 2 of bundled:tiny-sdxl has NaN or infinite weights"):
        explain_embeds(encoders, "fp32", bundled, "a red star")
