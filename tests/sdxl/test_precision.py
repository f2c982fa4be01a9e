"""Holds the names of number formats, and that 8-bit weights are small, close, and refused with a remedy where they cannot be had."""

import sys

import pytest
import torch

from sdxl_pipeline.sdxl.base_model import ResolvedModel
from sdxl_pipeline.sdxl.components import load_unet
from sdxl_pipeline.sdxl.precision import PrecisionError, dtype_from_name, dtype_name, quantize_base_model
from tests.sdxl.test_adapters import output


@pytest.mark.parametrize(
    ("name", "dtype", "back"),
    [
        ("no", torch.float32, "fp32"),
        ("bf16", torch.bfloat16, "bf16"),
        ("fp16", torch.float16, "fp16"),
        ("fp32", torch.float32, "fp32"),
    ],
)
def test_names_and_dtypes(name, dtype, back):
    assert dtype_from_name(name) == dtype
    assert dtype_name(dtype) == back


def test_an_unknown_name_is_refused():
    with pytest.raises(PrecisionError, match="'fp8' is not a precision"):
        dtype_from_name("fp8")


def test_int8_weights_are_a_quarter_of_fp32_and_predict_nearly_the_same(lively: ResolvedModel):
    quanto = pytest.importorskip("optimum.quanto")
    unet = load_unet(lively, torch.float32)
    exact = output(unet)
    quantize_base_model(unet, "int8-quanto")
    weight = unet.get_submodule("mid_block.attentions.0.proj_in").weight
    assert isinstance(weight, quanto.QTensor)
    assert weight._data.dtype == torch.int8
    assert not isinstance(unet.conv_out.weight, quanto.QTensor)
    error = (output(unet) - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.05


def test_no_change_changes_nothing(lively: ResolvedModel):
    unet = load_unet(lively, torch.float32)
    before = output(unet)
    quantize_base_model(unet, "no_change")
    assert torch.equal(output(unet), before)


def test_without_the_package_the_extra_is_named(lively: ResolvedModel, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(PrecisionError, match=r"sdxl-pipeline\[quantization\]"):
        quantize_base_model(load_unet(lively, torch.float32), "int8-quanto")


def test_an_unknown_quantization_is_refused(lively: ResolvedModel):
    with pytest.raises(PrecisionError, match="Write no_change or int8-quanto"):
        quantize_base_model(load_unet(lively, torch.float32), "nf4-bnb")
