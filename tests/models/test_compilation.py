"""torch.compile: a compiled UNet keeps its names and its results, fully or by blocks, with gradient checkpointing and in adapter files."""

import shutil

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import load_file

from sdxl_pipeline.models.adapters.adapter import UNET, add_lora, save_adapter
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.unet_execution import compile_unet, enable_checkpointing
from tests.models.test_precision import predict


def trained(model, backend: str, **options):
    torch._dynamo.reset()
    unet = load_unet(model, torch.float32).train()
    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "to_v"], seed=0)
    for parameter in parameters:
        parameter.data = torch.full_like(parameter, 0.01)
    if options.pop("checkpointing", False):
        enable_checkpointing(unet)
    compile_unet(unet, backend, **{"regional": True, **options})
    prediction = predict(unet)
    prediction.square().mean().backward()
    return unet, prediction.detach(), [parameter.grad for parameter in parameters]


@pytest.fixture(scope="module")
def plain(random_filled):
    return trained(random_filled, "no")


def test_compile_unet_by_blocks_gives_the_same_bits_and_names(random_filled, plain, tmp_path):
    unet, prediction, gradients = trained(random_filled, "eager", fullgraph=True, checkpointing=True)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert unet._compiled_call_impl is None
    assert torch.equal(prediction, plain[1])
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain[2], strict=True))
    assert list(unet.state_dict()) == list(plain[0].state_dict())
    for name, model in (("plain", plain[0]), ("compiled", unet)):
        save_adapter({UNET: model}, tmp_path / f"{name}.safetensors", {})
    assert (
        load_file(tmp_path / "plain.safetensors").keys()
        == load_file(tmp_path / "compiled.safetensors").keys()
    )


@pytest.mark.slow
def test_compile_unet_as_a_whole_gives_the_same_bits(random_filled, plain):
    unet, prediction, gradients = trained(random_filled, "aot_eager", regional=False)
    assert unet._compiled_call_impl is not None
    assert torch.equal(prediction, plain[1])
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain[2], strict=True))


def test_compile_unet_with_no_backend_changes_nothing(plain):
    assert plain[0]._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compile_unet_with_inductor_by_blocks_gives_close_results(random_filled, plain):
    unet, prediction, gradients = trained(random_filled, "inductor")
    assert unet._compiled_call_impl is None
    torch.testing.assert_close(prediction, plain[1], rtol=1e-4, atol=1e-5)
    # The adapter's equal weights make many gradients small differences of large sums: the error is that of the sums.
    largest = max(gradient.abs().max() for gradient in plain[2])
    for one, other in zip(gradients, plain[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float(1e-4 * largest))
    assert list(unet.state_dict()) == list(plain[0].state_dict())
