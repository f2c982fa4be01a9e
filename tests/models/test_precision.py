"""Precisions: names; quantized weights that are small, accurate and trainable through with an adapter that then works on the full weights;
and errors with a fix."""

import inspect
import sys
import typing

import pytest
import torch
from safetensors.torch import load_file

from sdxl_pipeline.config.hardware_profiles import BaseModelPrecision
from sdxl_pipeline.models.adapters.adapter import UNET, add_lora, load_adapter, save_adapter
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders, load_unet
from sdxl_pipeline.models.precision import PrecisionError, dtype_from_name, dtype_name, quantize_model
from tests.models.adapters.test_adapter import output

PACKAGES = {"quanto": "optimum.quanto", "torchao": "torchao", "bnb": "bitsandbytes"}
# relative error of the prediction with quantized base weights, and bytes per weight of a linear layer with its scales
EXPECTED = {
    "int8-quanto": (0.05, 1.1),
    "int4-quanto": (0.5, 0.7),
    "int2-quanto": (2.0, 0.45),
    "fp8-quanto": (0.1, 1.1),
    "fp8uz-quanto": (0.1, 1.1),
    "int8-torchao": (0.05, 1.1),
    "fp8wo-torchao": (0.1, 1.1),
    "nf4-bnb": (0.5, 0.65),  # lookup tables of one kilobyte are significant in so small a layer
}
BY_DEFAULT = ("int8-quanto", "int8-torchao", "nf4-bnb")


def predict(unet) -> torch.Tensor:
    """Run `output` with gradients."""
    return inspect.unwrap(output)(unet)


def require(name: str) -> None:
    pytest.importorskip(PACKAGES[name.rpartition("-")[2]], reason="needs the extra `quantization`")


@pytest.mark.parametrize(
    ("name", "dtype", "back"),
    [
        ("no", torch.float32, "fp32"),
        ("bf16", torch.bfloat16, "bf16"),
        ("fp16", torch.float16, "fp16"),
        ("fp32", torch.float32, "fp32"),
    ],
)
def test_dtype_names_round_trip(name, dtype, back):
    assert dtype_from_name(name) == dtype
    assert dtype_name(dtype) == back


def test_dtype_from_name_of_an_unknown_name_raises():
    with pytest.raises(PrecisionError, match="'fp8' is not a precision"):
        dtype_from_name("fp8")


def test_expected_covers_every_precision_setting():
    assert set(typing.get_args(BaseModelPrecision)) == {"no_change", *EXPECTED}


@pytest.mark.parametrize(
    "name",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED],
)
def test_adapter_trained_on_quantized_weights_works_on_full_weights(
    name, random_filled: ResolvedModel, tmp_path
):
    require(name)
    unet = load_unet(random_filled, torch.float32)
    exact = output(unet)
    quantize_model(unet, name)
    error = (output(unet) - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < EXPECTED[name][0]

    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = predict(unet).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    save_adapter({UNET: unet}, tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {torch.float32}
    full = load_unet(random_filled, torch.float32)
    load_adapter({UNET: full}, tmp_path / "lora.safetensors")
    assert output(full).square().mean() < exact.square().mean()


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_eval_forward_leaves_quantized_weights_trainable(name, random_filled: ResolvedModel):
    """In eval mode bitsandbytes would repack them on CPUs with the required instructions."""
    require(name)
    unet = load_unet(random_filled, torch.float32)
    quantize_model(unet, name)
    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "proj_in", "linear_1"], seed=0)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(predict(unet.train()).square().mean(), parameters)

    before = gradients()
    output(unet.eval())
    assert all(map(torch.equal, before, gradients()))
    if name == "nf4-bnb":
        layer = unet.get_submodule("mid_block.attentions.0.proj_out")
        assert layer.support_avx512bf16_for_cpu is False, "on any CPU"


def test_bitsandbytes_without_the_repack_attribute_raises(random_filled: ResolvedModel, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")

    class Another(bitsandbytes.nn.LinearNF4):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            del self.support_avx512bf16_for_cpu

    monkeypatch.setattr(bitsandbytes.nn, "LinearNF4", Another)
    with pytest.raises(PrecisionError, match=r"nf4-bnb.*support_avx512bf16_for_cpu.*or set int8-quanto"):
        quantize_model(load_unet(random_filled, torch.float32), "nf4-bnb")


@pytest.mark.parametrize("name", EXPECTED)
def test_quantized_weights_take_few_bytes(name, random_filled: ResolvedModel):
    from sdxl_pipeline.training.memory.memory_estimate import storage_bytes

    require(name)
    unet = load_unet(random_filled, torch.float32)
    quantize_model(unet, name)
    layer = unet.get_submodule("mid_block.attentions.0.proj_in")
    assert storage_bytes(layer.weight) / (96 * 96) < EXPECTED[name][1]
    assert unet.conv_out.weight.dtype == torch.float32
    assert type(unet.conv_out.weight) is torch.nn.Parameter


@pytest.mark.parametrize("name", ["int8-quanto", "int8-torchao", "nf4-bnb"])
def test_quantize_model_applies_to_text_encoders(name, random_filled: ResolvedModel):
    require(name)
    ids = torch.arange(77)[None] % 50
    encoder = load_text_encoders(random_filled, torch.float32).text_encoder
    exact = encoder(ids).last_hidden_state
    quantize_model(encoder, name, "text_encoder_1_precision")
    error = (encoder(ids).last_hidden_state - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.5


def test_quantize_model_no_change_changes_nothing(random_filled: ResolvedModel):
    unet = load_unet(random_filled, torch.float32)
    before = output(unet)
    quantize_model(unet, "no_change")
    assert torch.equal(output(unet), before)


@pytest.mark.parametrize(
    ("name", "module"),
    [("int8-quanto", "optimum"), ("int8-torchao", "torchao.quantization"), ("nf4-bnb", "bitsandbytes.nn")],
)
def test_quantize_model_without_its_package_raises_with_the_extra(
    name, module, random_filled: ResolvedModel, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PrecisionError, match=rf"{name}.*sdxl-pipeline\[quantization\]"):
        quantize_model(load_unet(random_filled, torch.float32), name)


def test_quantize_model_with_an_unknown_name_raises(random_filled: ResolvedModel):
    with pytest.raises(PrecisionError, match="Set one of no_change, int8-quanto"):
        quantize_model(load_unet(random_filled, torch.float32), "int3-nothing")
