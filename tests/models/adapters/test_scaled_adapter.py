"""The scale of a loaded adapter: 0 is the base model, 1 the adapter, and updates are proportional between."""

import pytest
import torch

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import add_adapter, scaled_adapter, without_adapter
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.models.components import load_unet

LOKR = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, "apply_preset": {"target_module": ["Attention"]}}


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"lora_type": "lycoris", "lycoris_config": LOKR}],
    ids=["lora", "dora", "lokr"],
)
def test_scaled_adapter_is_base_at_zero_and_unchanged_at_one(changes, tmp_path):
    settings = TrainingSettings.model_validate(
        {"pretrained_model_name_or_path": BUNDLED_NAME, "lora_rank": 2, **changes}
    )
    unet = load_unet(resolve_base_model(settings, tmp_path, cache_dir=tmp_path), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in add_adapter(unet, settings, seed=1):
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    inputs = torch.randn(3, layer.in_features, generator=generator)
    with torch.no_grad():
        plain = layer(inputs)
        with without_adapter(unet):
            base = layer(inputs)
        outputs = {}
        for scale in (0.0, 0.5, 1.0, 2.0):
            with scaled_adapter([unet], scale):
                outputs[scale] = layer(inputs)
        assert torch.equal(layer(inputs), plain)
    assert not torch.allclose(plain, base, atol=1e-3)
    assert torch.equal(outputs[0.0], base)
    assert torch.allclose(outputs[1.0], plain, atol=1e-6)
    if not changes.get("use_dora"):
        assert torch.allclose(outputs[0.5] - base, 0.5 * (plain - base), atol=1e-5)
        assert torch.allclose(outputs[2.0] - base, 2 * (plain - base), atol=1e-5)
