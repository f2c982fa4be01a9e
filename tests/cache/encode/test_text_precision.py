"""Holds that text encoders in fewer bits give other embeddings, under other names, and that whole ones keep theirs."""

import pytest
import torch

from sdxl_pipeline.cache.encode.encoder_devices import load_encoders
from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.models.prompt_encoding import encode_prompts


def hardware(**values) -> Hardware:
    return Hardware.model_validate(PRESETS["cpu"].model_dump() | values)


def test_a_caption_is_stored_under_the_precision_it_was_embedded_in():
    assert hardware().text_precision == hardware().text_dtype == "fp32"
    one = hardware(text_encoder_1_precision="int8-quanto")
    other = hardware(text_encoder_2_precision="int8-quanto")
    assert len({"fp32", one.text_precision, other.text_precision}) == 3


def test_each_encoder_has_its_own(tmp_path):
    pytest.importorskip("torchao", reason="needs the extra `quantization`")
    model = resolve_base_model(
        TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), tmp_path, tmp_path
    )
    whole, _ = encode_prompts(load_encoders(model, hardware()), ["a red circle"])
    rounded, _ = encode_prompts(
        load_encoders(model, hardware(text_encoder_2_precision="int8-torchao")), ["a red circle"]
    )
    first = 64  # width of the bundled model's first encoder
    assert torch.equal(whole[..., :first], rounded[..., :first])
    assert not torch.equal(whole[..., first:], rounded[..., first:])
    torch.testing.assert_close(whole, rounded, atol=0.3, rtol=0)
