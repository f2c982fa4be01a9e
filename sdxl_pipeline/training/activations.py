"""How much the UNet keeps of its forward pass for the backward one: a rule, for before there is anything to measure."""

from collections.abc import Iterator
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdxl_pipeline.sdxl.activation_checkpointing import LAYERS

LATENT_EDGE = 8
"""Pixels along one edge of a latent."""


@dataclass(frozen=True)
class Pass:
    """A forward pass with gradients. `itemsize`: bytes of a number it computes with, 2 under mixed precision."""

    height: int  # pixels
    width: int
    batch_size: int
    itemsize: int
    full: bool  # all weights are trained, not an adapter
    checkpointing: bool
    interval: int = 1


def activation_bytes(unet: UNet2DConditionModel, asked: Pass) -> int:
    """What autograd keeps, and what one layer takes in passing beside that.

    Each layer keeps so many bytes for each number that goes in or comes out: a residual block for its input and output channels times
    its pixels, a transformer block for its channels times its tokens. The factors below are least-squares fits to what torch saves of
    SDXL's UNet at 512 and 1024 pixels and of the bundled one, with attention that keeps no score matrix; they meet those within 3 %. A
    recomputed layer keeps its inputs alone, and in passing takes what the largest one keeps otherwise.
    """
    whole = [size * factor for size, factor in _layers(unet, asked)]
    kept = list(whole)
    if asked.checkpointing:
        recomputed = _inputs(unet, asked)
        kept[:: asked.interval] = recomputed[:: asked.interval]
    return round(asked.batch_size * (sum(kept) + max(whole)))


def _layers(unet: UNet2DConditionModel, asked: Pass) -> Iterator[tuple[int, float]]:
    """(numbers that go in or come out, bytes kept for each) of each layer, for one picture."""
    # of a residual block, of a transformer block; float32 group norms stand in both columns of the former
    residual, transformer = {
        (False, 2): (18.5, 41.0),
        (False, 4): (20.0, 83.0),
        (True, 2): (10.8, 53.0),
        (True, 4): (21.6, 105.5),
    }[asked.full, asked.itemsize]
    for size, is_residual in _sizes(unet, asked):
        yield size, residual if is_residual else transformer


def _inputs(unet: UNet2DConditionModel, asked: Pass) -> list[float]:
    residual = (
        1.51 if asked.full else 1.13
    )  # the layers between them are counted with it: samplers, norms and projections
    return [
        size * asked.itemsize * (residual if is_residual else 0.95)
        for size, is_residual in _sizes(unet, asked)
    ]


def _sizes(unet: UNet2DConditionModel, asked: Pass) -> Iterator[tuple[int, bool]]:
    """For each of `LAYERS`: its numbers, and whether it is a residual block."""
    for name, layer in unet.named_modules():
        if isinstance(layer, LAYERS):
            edge = LATENT_EDGE << _level(name, len(unet.config.block_out_channels))
            places = (asked.height // edge) * (asked.width // edge)
            is_residual = isinstance(layer, ResnetBlock2D)
            yield places * _channels(layer), is_residual


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
