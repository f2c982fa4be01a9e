"""Attention kernels: every attention layer of the UNet calls the selected kernel, with gradients and equal results."""

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention

from sdxl_pipeline.models.adapters.adapter import add_lora
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.unet_execution import (
    BACKENDS,
    AttentionKernelError,
    use_attention_backend,
    use_attention_kernel,
)
from tests.models.test_precision import predict

CPU = torch.device("cpu")


def trained(model, backend: str | None):
    unet = load_unet(model, torch.float32).train()
    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "to_v"], seed=0)
    for parameter in parameters:
        parameter.data = torch.full_like(parameter, 0.01)  # else the first gradient of every A is zero
    if backend is not None:
        use_attention_backend(unet, backend)
    prediction = predict(unet)
    prediction.square().mean().backward()
    return prediction.detach(), [parameter.grad for parameter in parameters]


@pytest.mark.parametrize(("backend", "tolerance"), [("native", 0.0), ("_native_math", 1e-5)])
def test_use_backend_equals_the_default_processor(random_filled, backend, tolerance):
    expected, expected_gradients = trained(random_filled, None)
    found, gradients = trained(random_filled, backend)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance)


def test_use_attention_kernel_applies_to_every_attention_layer(bundled, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName.XFORMERS
    native = registry._backends[attention_dispatch.AttentionBackendName.NATIVE]
    calls = []

    def fake_kernel(query, key, value, **_):
        calls.append(query.shape)
        return native(query, key, value)

    monkeypatch.setitem(registry._backends, name, fake_kernel)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    unet = load_unet(bundled, torch.float32)
    use_attention_kernel(unet, "xformers", torch.device("cuda"))
    predict(unet)
    assert len(calls) == sum(isinstance(module, Attention) for module in unet.modules())
    assert {len(shape) for shape in calls} == {4}


def test_use_attention_kernel_diffusers_changes_nothing(bundled):
    unet = load_unet(bundled, torch.float32)
    before = dict(unet.attn_processors)
    use_attention_kernel(unet, "diffusers", CPU)
    assert unet.attn_processors == before


@pytest.mark.parametrize("mechanism", BACKENDS)
def test_use_attention_kernel_on_a_cpu_raises(bundled, mechanism):
    with pytest.raises(AttentionKernelError, match="the device is cpu"):
        use_attention_kernel(load_unet(bundled, torch.float32), mechanism, CPU)


def test_use_attention_kernel_without_its_package_raises(bundled, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    with pytest.raises(AttentionKernelError, match="flash-attn"):
        use_attention_kernel(load_unet(bundled, torch.float32), "flash-attn-2", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mechanism", ["xformers", "flash-attn-2"])
def test_gpu_kernel_equals_pytorch(bundled, mechanism):
    unet = load_unet(bundled, torch.bfloat16).to("cuda")
    expected = predict(unet)
    try:
        use_attention_kernel(unet, mechanism, torch.device("cuda"))
    except AttentionKernelError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(predict(unet), expected, rtol=0.05, atol=0.05)
