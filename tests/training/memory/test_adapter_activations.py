"""The saved activations of adapters equal hand counts, do not depend on quantization, and are measured without side effects."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_pipeline.models.adapters.adapter import add_adapter
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.models.precision import quantize_model
from sdxl_pipeline.training.memory.activations import SavedActivations, saved_by_adapters
from tests.models.adapted_unets import lycoris, settings_of
from tests.models.test_precision import require

BLOCK = "mid_block.attentions.0.transformer_blocks.0"  # 96 channels wide, of texts of 128


def adapted(kind: str = "lora", precision: str = "no_change", **settings) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(BUNDLED_MODEL / "unet").requires_grad_(False)
    quantize_model(unet, precision)
    add_adapter(unet, settings_of(kind, base_model_precision=precision, **settings), seed=0)
    return unet


def test_saved_by_adapters_lora_saves_down_projections_and_shared_inputs_once():
    saved = saved_by_adapters(adapted(lora_rank=8), torch.float32)
    product = 4 * 8
    first, *others = (saved[f"{BLOCK}.attn1.{name}"] for name in ("to_q", "to_k", "to_v", "to_out.0"))
    assert first == SavedActivations(product + 4 * 96, 0)
    assert others == 3 * [SavedActivations(product, 0)]
    of_text = [saved[name].per_position for name in saved if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert sorted(of_text) == [product] * (len(of_text) - 1) + [product + 4 * 128]


def test_saved_by_adapters_with_dropout_each_layer_saves_its_input():
    saved = saved_by_adapters(adapted(lora_rank=8, lora_dropout=0.5), torch.float32)
    mask = 4 * 96  # scaled by torch, in the dtype of the input
    assert {saved[f"{BLOCK}.attn1.{name}"].per_position for name in ("to_k", "to_v")} == {32 + 4 * 96 + mask}


def test_saved_by_adapters_dora_saves_weight_recomposition():
    saved = saved_by_adapters(adapted("dora"), torch.float32)[f"{BLOCK}.attn1.to_k"]
    rank, width = 4, 96
    assert saved.fixed >= 4 * (width * width + rank * width)  # an identity matrix, and its product with A
    assert saved.per_position >= 4 * (2 * width + rank)  # the base's output, the update's, and A x


def test_saved_by_adapters_without_adapter_is_empty():
    assert (
        saved_by_adapters(UNet2DConditionModel.from_pretrained(BUNDLED_MODEL / "unet"), torch.float32) == {}
    )


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("lora", "int8-quanto"), ("dora", "int8-torchao"), ("dora", "nf4-bnb"), ("lokr", "nf4-bnb")],
)
def test_saved_by_adapters_does_not_depend_on_quantization(kind, precision):
    require(precision)
    assert saved_by_adapters(adapted(kind, precision), torch.float32) == saved_by_adapters(
        adapted(kind), torch.float32
    )


def test_saved_by_adapters_has_no_side_effects():
    config = lycoris("lokr", factor=4, dropout=0.5, module_dropout=0.9)["lycoris_config"]
    unet = adapted("lokr", lycoris_config=config).eval()
    state = torch.random.get_rng_state()
    saved = saved_by_adapters(unet, torch.bfloat16)
    assert all(each.per_position > 0 for each in saved.values()), (
        "a layer disabled by module dropout would save nothing"
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in unet.modules())
    assert {adapter.module_dropout for adapter in unet.lycoris.loras} == {0.9}
    assert all(parameter.grad is None for parameter in unet.parameters())
