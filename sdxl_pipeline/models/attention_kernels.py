"""The kernel that computes a UNet's attention, by the settings' names, through diffusers' attention backends.

`UNet2DConditionModel.set_attention_backend` leaves a UNet as it is (diffusers 0.42): the processor of its attention layers calls PyTorch's
function directly. Hence the processor here, which asks diffusers' dispatcher instead.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor

BACKENDS: Mapping[str, str] = {"xformers": "xformers", "flash-attn-2": "flash", "flex": "flex"}
"""The settings' names of attention kernels and diffusers' own, but for `diffusers`, PyTorch's function with its own choice of kernel."""


class AttentionKernelError(Exception):
    """A kernel that cannot be used here; the message says why."""


class DispatchedAttention:
    """Attention of SDXL's UNet (Vaswani et al. 2017, section 3.2) by one of diffusers' backends.

    The projections are the layer's own. What SDXL's UNet has none of is left out: masks, norms and a residual within the layer.
    """

    def __init__(self, backend: AttentionBackendName) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C); keys and values are of `encoder_hidden_states` (B, M, D), where given."""
        if attention_mask is not None:
            raise AttentionKernelError("SDXL's UNet is trained without attention masks")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (  # (B, L, heads, C / heads), as diffusers' backends take them
            projected.unflatten(-1, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        attended: Tensor = dispatch_attention_fn(query, key, value, backend=self.backend)
        projected: Tensor = attn.to_out[0](attended.flatten(-2).to(query.dtype))
        return attn.to_out[1](projected)


def use_attention_kernel(unet: UNet2DConditionModel, mechanism: str, device: torch.device) -> None:
    """Compute the UNet's attention by the kernel that the settings call `mechanism`, on `device`; `diffusers` changes nothing.

    Raises AttentionKernelError where there is no such kernel for the device, or its package is not installed.
    """
    if mechanism == "diffusers":
        return
    if device.type != "cuda":
        raise AttentionKernelError(
            f"{mechanism} has kernels for GPUs of CUDA or ROCm only, and the device is {device.type}"
        )
    use_backend(unet, BACKENDS[mechanism])


def use_backend(unet: UNet2DConditionModel, name: str) -> None:
    """The same by diffusers' own name of a backend, for any device. Raises AttentionKernelError when its package is not installed."""
    backend = AttentionBackendName(name)
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        raise AttentionKernelError(str(error)) from error
    for layer in _attention_layers(unet):
        layer.set_processor(DispatchedAttention(backend))


def _attention_layers(unet: UNet2DConditionModel) -> list[Any]:
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        parts = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
        plain = not any(parts) and not layer.residual_connection and layer.rescale_output_factor == 1
        if not plain:
            raise AttentionKernelError("the UNet's attention is not built as SDXL's is")
    return layers
