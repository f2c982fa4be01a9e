"""Holds what adapted layers are said to keep for the backward pass: as counted by hand, the same over weights in few bits, and asked
without leaving a trace.
"""

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_pipeline.models.adapters.adapter import add_adapter
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.models.precision import quantize_model
from sdxl_pipeline.training.memory.adapter_activations import SavedActivations, saved_by_adapters
from tests.models.adapted_unets import lycoris, settings_of
from tests.models.test_precision import require

BLOCK = "mid_block.attentions.0.transformer_blocks.0"  # 96 channels wide, of texts of 128


def adapted(kind: str = "lora", precision: str = "no_change", **settings) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(BUNDLED_MODEL / "unet").requires_grad_(False)
    quantize_model(unet, precision)
    add_adapter(unet, settings_of(kind, base_model_precision=precision, **settings), seed=0)
    return unet


def test_a_lora_keeps_its_first_products_and_what_several_have_in_common_once():
    kept = saved_by_adapters(adapted(lora_rank=8), torch.float32)
    product = 4 * 8
    first, *others = (kept[f"{BLOCK}.attn1.{name}"] for name in ("to_q", "to_k", "to_v", "to_out.0"))
    assert first == SavedActivations(product + 4 * 96, 0)
    assert others == 3 * [SavedActivations(product, 0)]
    of_text = [kept[name].by_place for name in kept if name.endswith(("attn2.to_k", "attn2.to_v"))]
    assert sorted(of_text) == [product] * (len(of_text) - 1) + [product + 4 * 128]


def test_with_dropout_each_keeps_its_own_input():
    kept = saved_by_adapters(adapted(lora_rank=8, lora_dropout=0.5), torch.float32)
    mask = 4 * 96  # scaled by torch, in the numbers' own type
    assert {kept[f"{BLOCK}.attn1.{name}"].by_place for name in ("to_k", "to_v")} == {32 + 4 * 96 + mask}


def test_a_dora_keeps_what_its_weight_is_rebuilt_from():
    kept = saved_by_adapters(adapted("dora"), torch.float32)[f"{BLOCK}.attn1.to_k"]
    rank, width = 4, 96
    assert kept.once >= 4 * (width * width + rank * width)  # a unit matrix, and it times A
    assert kept.by_place >= 4 * (2 * width + rank)  # the base's output, the update's, and A x


def test_without_an_adapter_nothing_is_kept():
    assert (
        saved_by_adapters(UNet2DConditionModel.from_pretrained(BUNDLED_MODEL / "unet"), torch.float32) == {}
    )


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("lora", "int8-quanto"), ("dora", "int8-torchao"), ("dora", "nf4-bnb"), ("lokr", "nf4-bnb")],
)
def test_over_weights_in_few_bits_it_is_the_same(kind, precision):
    require(precision)
    assert saved_by_adapters(adapted(kind, precision), torch.float32) == saved_by_adapters(
        adapted(kind), torch.float32
    )


def test_asking_leaves_no_trace():
    config = lycoris("lokr", factor=4, dropout=0.5, module_dropout=0.9)["lycoris_config"]
    unet = adapted("lokr", lycoris_config=config).eval()
    state = torch.random.get_rng_state()
    kept = saved_by_adapters(unet, torch.bfloat16)
    assert all(each.by_place > 0 for each in kept.values()), "a layer that was left out keeps nothing"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in unet.modules())
    assert {adapter.module_dropout for adapter in unet.lycoris.loras} == {0.9}
    assert all(parameter.grad is None for parameter in unet.parameters())
