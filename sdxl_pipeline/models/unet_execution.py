"""How a UNet's layers are executed: attention kernels, torch.compile and gradient checkpointing.

Attention kernels are set through diffusers' attention backends. `UNet2DConditionModel.set_attention_backend` has no effect on a UNet
(diffusers 0.42): the processor of its attention layers calls PyTorch's function directly. Hence the processor here, which calls diffusers'
dispatcher instead.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BACKENDS: Mapping[str, str] = {"xformers": "xformers", "flash-attn-2": "flash", "flex": "flex"}
"""Settings names of attention kernels -> diffusers' names; `diffusers`, PyTorch's function with its own choice of kernel, is omitted."""

RECOMPILE_LIMIT = 64
"""Maximum number of compiled variants of a code object: by layer width, training or sampling, adapter enabled or not, and bucket size.

Torch's default is 8; beyond it torch falls back to eager mode.
"""

CHECKPOINTED_LAYERS = (ResnetBlock2D, BasicTransformerBlock)
"""Layer types that diffusers' UNets recompute one at a time, except `NEVER_CHECKPOINTED`."""

NEVER_CHECKPOINTED = "mid_block.resnets.0"


class AttentionKernelError(Exception):
    """An attention kernel cannot be used here. The message says why."""


class DispatchedAttnProcessor:
    """Attention processor of SDXL's UNet (Vaswani et al. 2017, section 3.2) for one of diffusers' backends.

    The projections are the layer's own. SDXL's UNet has no attention masks, no norms and no residual within the layer.
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
        """Compute (B, L, C) -> (B, L, C); keys and values come from `encoder_hidden_states` (B, M, D), if given."""
        if attention_mask is not None:
            raise AttentionKernelError("SDXL's UNet is trained without attention masks")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (  # (B, L, heads, C / heads), the layout of diffusers' backends
            projected.unflatten(-1, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        attended: Tensor = dispatch_attention_fn(query, key, value, backend=self.backend)
        projected: Tensor = attn.to_out[0](attended.flatten(-2).to(query.dtype))
        return attn.to_out[1](projected)


def use_attention_kernel(unet: UNet2DConditionModel, mechanism: str, device: torch.device) -> None:
    """Compute the UNet's attention with the kernel of the setting `mechanism` on `device`; `diffusers` changes nothing.

    Raises AttentionKernelError if the kernel does not support the device, or its package is not installed.
    """
    if mechanism == "diffusers":
        return
    if device.type != "cuda":
        raise AttentionKernelError(
            f"{mechanism} has kernels for CUDA and ROCm GPUs only, and the device is {device.type}"
        )
    use_attention_backend(unet, BACKENDS[mechanism])


def use_attention_backend(unet: UNet2DConditionModel, name: str) -> None:
    """Set diffusers' attention backend `name` for any device. Raises AttentionKernelError when its package is not installed."""
    backend = AttentionBackendName(name)
    try:
        attention_dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        raise AttentionKernelError(str(error)) from error
    for layer in _attention_layers(unet):
        layer.set_processor(DispatchedAttnProcessor(backend))


def _attention_layers(unet: UNet2DConditionModel) -> list[Any]:
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        parts = (layer.spatial_norm, layer.group_norm, layer.norm_cross, layer.norm_q, layer.norm_k)
        plain = not any(parts) and not layer.residual_connection and layer.rescale_output_factor == 1
        if not plain:
            raise AttentionKernelError("the UNet's attention layers differ from SDXL's")
    return layers


def compile_unet(
    unet: UNet2DConditionModel,
    backend: str,
    *,
    regional: bool,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> None:
    """Compile the UNet in place with torch.compile at its first call; `backend` "no" changes nothing.

    Names of modules and parameters stay, and so do checkpoints and adapters. `regional` compiles only the repeated transformer blocks, of
    which SDXL has 70: the first step takes a fraction of the compile time, and the rest runs in eager mode. `mode`, `fullgraph` and
    `dynamic` are torch.compile's own.
    """
    if backend == "no":
        return
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    options: dict[str, Any] = {"backend": backend, "fullgraph": fullgraph, "dynamic": dynamic}
    if backend == "inductor":
        options["mode"] = mode
    if regional:
        unet.compile_repeated_blocks(**options)
    else:
        unet.compile(**options)


def enable_checkpointing(unet: UNet2DConditionModel, interval: int | None = None) -> None:
    """Recompute activations in the backward pass (Chen et al. 2016) of every `interval`-th of `CHECKPOINTED_LAYERS`, the first included; of all for None.

    Gradients are bit-identical. Other layers store their activations: a longer interval is faster and needs more memory.
    """
    if interval is None or interval == 1:
        unet.enable_gradient_checkpointing()
        return
    layers = [module for module in unet.modules() if isinstance(module, CHECKPOINTED_LAYERS)]
    chosen = set(layers[::interval])

    def run(layer: nn.Module, *inputs: Any) -> Any:
        if layer not in chosen:
            return layer(*inputs)
        return checkpoint(layer.__call__, *inputs, use_reentrant=False)

    unet.enable_gradient_checkpointing(run)
