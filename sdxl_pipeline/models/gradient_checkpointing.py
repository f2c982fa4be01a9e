"""Gradient checkpointing: activations thrown away in the forward pass and computed again in the backward one (Chen et al. 2016)."""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYERS = (ResnetBlock2D, BasicTransformerBlock)
"""What diffusers' UNets recompute, one at a time, but for `NEVER_RECOMPUTED`."""

NEVER_RECOMPUTED = "mid_block.resnets.0"


def enable_checkpointing(unet: UNet2DConditionModel, interval: int | None = None) -> None:
    """Recompute the activations of every `interval`-th of `LAYERS`, the first included; of all where there is none.

    Gradients are the same, to the bit. The layers between keep theirs: the longer the interval, the faster, and the more memory.
    """
    if interval is None or interval == 1:
        unet.enable_gradient_checkpointing()
        return
    layers = [module for module in unet.modules() if isinstance(module, LAYERS)]
    chosen = set(layers[::interval])

    def run(layer: nn.Module, *inputs: Any) -> Any:
        if layer not in chosen:
            return layer(*inputs)
        return checkpoint(layer.__call__, *inputs, use_reentrant=False)

    unet.enable_gradient_checkpointing(run)
