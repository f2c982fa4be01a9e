"""Quantized text encoders: other embeddings under other keys; full-precision encoders keep their keys."""

import pytest
import torch

from sdxl_pipeline.cache.encode.encoders import load_encoders
from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.models.conditioning import encode_prompts


def make_hardware(**values) -> Hardware:
    return Hardware.model_validate(PRESETS["cpu"].model_dump() | values)


def test_text_precision_differs_per_quantized_encoder():
    assert make_hardware().text_precision == make_hardware().text_dtype == "fp32"
    one = make_hardware(text_encoder_1_precision="int8-quanto")
    other = make_hardware(text_encoder_2_precision="int8-quanto")
    assert len({"fp32", one.text_precision, other.text_precision}) == 3


def test_load_encoders_quantizes_each_encoder_separately(tmp_path):
    pytest.importorskip("torchao", reason="needs the extra `quantization`")
    model = resolve_base_model(
        TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), tmp_path, tmp_path
    )
    full_precision, _ = encode_prompts(load_encoders(model, make_hardware()), ["a red circle"])
    quantized, _ = encode_prompts(
        load_encoders(model, make_hardware(text_encoder_2_precision="int8-torchao")), ["a red circle"]
    )
    first = 64  # width of the bundled model's first encoder
    assert torch.equal(full_precision[..., :first], quantized[..., :first])
    assert not torch.equal(full_precision[..., first:], quantized[..., first:])
    torch.testing.assert_close(full_precision, quantized, atol=0.3, rtol=0)
