"""How much the UNet keeps of its forward pass for the backward one: a rule, for before there is anything to measure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdxl_pipeline.models.unet_execution import LAYERS, NEVER_RECOMPUTED
from sdxl_pipeline.training.memory.adapter_activations import SavedActivations, takes_text

LATENT_EDGE = 8
"""Pixels along one edge of a latent."""

_TOKENS: Final = 77
_NO_ADAPTER: Final[Mapping[str, SavedActivations]] = MappingProxyType({})


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass with gradients. `dtype`: of the numbers it computes with."""

    height: int  # pixels
    width: int
    batch_size: int
    dtype: torch.dtype
    full: bool  # all weights are trained, not an adapter
    checkpointing: bool
    interval: int = 1
    wide_norms: bool = False  # computed in float32 whatever `dtype` is, as under torch's autocast on CUDA


@dataclass(frozen=True)
class _Factors:
    """Bytes kept for each byte of the numbers that a layer is counted by."""

    residual: float  # block
    transformer: float  # block
    residual_inputs: float  # samplers, and norms and projections between the blocks, included
    transformer_inputs: float


_FACTORS: Final[Mapping[tuple[bool, bool], _Factors]] = {
    (False, False): _Factors(4.35, 20.2, 1.13, 0.95),
    (False, True): _Factors(7.22, 23.2, 1.36, 0.99),
    (True, False): _Factors(5.4, 26.4, 1.51, 0.95),
    (True, True): _Factors(7.6, 32.1, 1.76, 1.0),
}
"""By `full` and `wide_norms`: least-squares fits to what torch saves of SDXL's UNet at 512 and 1024 pixels and of the bundled one, without
an adapter, with attention that keeps no score matrix."""


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    kept: float
    """From the forward pass to the backward one."""
    passing: float
    """Of one layer while it runs, beside that."""


def activations(
    unet: UNet2DConditionModel, asked: ForwardPass, adapters: Mapping[str, SavedActivations] = _NO_ADAPTER
) -> Activations:
    """What a pass takes; `adapters` is what `saved_by_adapters` says of the UNet.

    Each layer keeps so many bytes for each number that goes in or comes out: a residual block for its input and output channels times
    its pixels, a transformer block for its channels times its tokens; with its adapter, what that keeps as well. A recomputed layer
    keeps its inputs alone, and in passing takes what the largest one keeps otherwise.
    """
    plain = dict(_layers(unet, asked))
    added = dict.fromkeys(plain, 0.0)
    outside = 0.0
    for name, extra in adapters.items():
        size = extra.once + extra.by_place * asked.batch_size * _places(name, unet, asked)
        layer = _enclosing(name, plain)
        if layer is None:
            outside += size
        else:
            added[layer] += size
    whole = {name: size + added[name] for name, size in plain.items()}
    kept = list(whole.values())
    if asked.checkpointing:
        recomputed = list(_inputs(unet, asked))
        kept[:: asked.interval] = recomputed[:: asked.interval]
        if NEVER_RECOMPUTED in list(whole)[:: asked.interval]:
            outside += added[NEVER_RECOMPUTED]
    return Activations(sum(kept) + outside, max(whole.values()))


def _layers(unet: UNet2DConditionModel, asked: ForwardPass) -> Iterator[tuple[str, float]]:
    """The name of each layer, and the bytes that it keeps without an adapter."""
    factors = _FACTORS[asked.full, asked.wide_norms]
    for name, size, is_residual in _sizes(unet, asked):
        yield name, size * (factors.residual if is_residual else factors.transformer)


def _inputs(unet: UNet2DConditionModel, asked: ForwardPass) -> Iterator[float]:
    factors = _FACTORS[asked.full, asked.wide_norms]
    for _, size, is_residual in _sizes(unet, asked):
        yield size * (factors.residual_inputs if is_residual else factors.transformer_inputs)


def _enclosing(name: str, layers: Mapping[str, float]) -> str | None:
    """Which of `layers` a layer is a part of."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def _places(name: str, unet: UNet2DConditionModel, asked: ForwardPass) -> int:
    """Tokens or pixels of one image that go into a layer."""
    if takes_text(name):
        return _TOKENS
    if name.endswith("time_emb_proj") or name.startswith(("time_embedding.", "add_embedding.")):
        return 1
    level = 0
    if not name.startswith("conv_"):
        # samplers are placed after the layers of their level, and one that enlarges has done so before its convolution
        level = _level(name, len(unet.config.block_out_channels)) - (".upsamplers." in name)
    return _at_level(asked, level)


def _at_level(asked: ForwardPass, level: int) -> int:
    edge = LATENT_EDGE << level
    return (asked.height // edge) * (asked.width // edge)


def _sizes(unet: UNet2DConditionModel, asked: ForwardPass) -> Iterator[tuple[str, int, bool]]:
    """For each of `LAYERS`: its name, the bytes of its numbers, and whether it is a residual block."""
    each = asked.batch_size * asked.dtype.itemsize
    for name, layer in unet.named_modules():
        if isinstance(layer, LAYERS):
            places = _at_level(asked, _level(name, len(unet.config.block_out_channels)))
            yield name, each * places * _channels(layer), isinstance(layer, ResnetBlock2D)


def _channels(layer: nn.Module) -> int:
    if isinstance(layer, ResnetBlock2D):
        return int(layer.in_channels + layer.out_channels)
    assert isinstance(layer, BasicTransformerBlock)
    return int(layer.dim)


def _level(name: str, levels: int) -> int:
    """How often a layer's place has been halved: "down_blocks.1.resnets.0" once, "up_blocks.0" as often as the middle."""
    part, _, rest = name.partition(".")
    if part == "mid_block":
        return levels - 1
    number = int(rest.partition(".")[0])
    return number if part == "down_blocks" else levels - 1 - number
