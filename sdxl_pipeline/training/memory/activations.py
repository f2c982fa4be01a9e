"""An estimate of the activations that the UNet saves for the backward pass, made before anything can be measured."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.lora import lora_layers
from sdxl_pipeline.models.adapters.lycoris import lycoris_layers, lycoris_network
from sdxl_pipeline.models.unet_execution import CHECKPOINTED_LAYERS, NEVER_CHECKPOINTED

_PROBE_SIZES: Final = (4, 8)
"""Tokens, or pixels along an edge, of the probe inputs. Two sizes separate what is saved per position from what is fixed."""

_ATTENTION_OUTPUT: Final = "attention output"

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that an adapted layer saves in addition to those of the layer without its adapter."""

    per_position: float
    """Per input token or pixel of one image."""
    fixed: float
    """Per forward pass, independent of the input: recomposed or cast weights."""


def saved_by_adapters(unet: nn.Module, dtype: torch.dtype) -> dict[str, SavedActivations]:
    """Return the saved activations of each adapted layer of a UNet that computes in `dtype`, by name; empty without an adapter.

    One layer of each kind and size runs on a few zeros. An input that is saved unchanged counts for the first of the layers that share it,
    and the attention output for none, since attention itself saves it.
    """
    measured: dict[tuple[Any, ...], tuple[SavedActivations, float]] = {}
    counted = {_ATTENTION_OUTPUT}
    saved: dict[str, SavedActivations] = {}
    for name, adapted, plain, base in _adapted_layers(unet):
        key = (*_size(base), *(tuple(parameter.shape) for parameter in adapted.parameters()))
        if key not in measured:
            measured[key] = _measure(adapted, plain, base, dtype)
        saved[name], input_bytes = measured[key]
        if input_bytes and (source := _input_source(name)) not in counted:
            counted.add(source)
            saved[name] = SavedActivations(saved[name].per_position + input_bytes, saved[name].fixed)
    return saved


def takes_text(name: str) -> bool:
    """Return whether a layer of this name takes the prompt's tokens as input."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def _input_source(name: str) -> str:
    """Return a label of the layer's input, equal for layers that share the input."""
    if name.endswith("to_out.0"):
        return _ATTENTION_OUTPUT
    if takes_text(name):
        return "text"
    return name.rpartition(".")[0] if name.endswith((".to_q", ".to_k", ".to_v")) else name


def _adapted_layers(unet: nn.Module) -> Iterator[tuple[str, Any, Layer, Any]]:
    """Yield (name, layer with its adapter, callable without the adapter, layer with the base weight)."""
    network = lycoris_network(unet)
    if network is None:
        for name, layer in lora_layers(unet).items():
            yield name, layer, layer.get_base_layer(), layer.get_base_layer()
        return
    adapters = {id(adapter.org_module[0]): adapter for adapter in network.loras}
    for name, base in lycoris_layers(unet).items():
        yield name, adapters[id(base)], adapters[id(base)].org_forward, base


def _size(base: Any) -> tuple[Any, ...]:
    if isinstance(base, nn.Conv2d):
        return base.in_channels, base.out_channels, base.kernel_size, base.stride
    return base.in_features, base.out_features


def _measure(
    adapted: Any, plain: Layer, base: nn.Module, dtype: torch.dtype
) -> tuple[SavedActivations, float]:
    """Return what a layer saves besides its input, and the bytes of one position of its input if it saves that, else 0."""
    trained = next(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    own = {
        _storage(tensor) for layer in (adapted, base) for tensor in chain(layer.parameters(), layer.buffers())
    }
    width, *_ = _size(base)
    is_convolution = isinstance(base, nn.Conv2d)
    extra, saves_input = [], False
    with _training_mode(adapted), torch.autocast(trained.device.type, dtype, enabled=dtype != torch.float32):
        for side in _PROBE_SIZES:
            shape = (1, width, side, side) if is_convolution else (1, side, width)
            inputs = trained.new_zeros(shape, dtype=dtype)
            saved, saves_input = _saved(adapted, inputs, own)
            extra.append(saved - _saved(plain, inputs, own)[0])
    few, many = (side * side if is_convolution else side for side in _PROBE_SIZES)
    per_position = (extra[1] - extra[0]) / (many - few)
    return SavedActivations(per_position, extra[0] - few * per_position), saves_input * width * dtype.itemsize


@contextmanager
def _training_mode(adapted: Any) -> Iterator[None]:
    """Enable dropout, except LyCORIS' module dropout, and preserve the random state."""
    was_training, module_dropout = adapted.training, getattr(adapted, "module_dropout", None)
    device = next(adapted.parameters()).device
    adapted.train()
    if module_dropout:
        adapted.module_dropout = 0.0
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        adapted.train(was_training)
        if module_dropout:
            adapted.module_dropout = module_dropout


def _saved(layer: Layer, inputs: Tensor, own: set[int]) -> tuple[int, bool]:
    """Return the bytes that autograd saves for one pass, without its input and the storages `own`, and whether it saves its input."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(_storage(tensor), tensor)
        return tensor

    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs)
    saves_input = saved.pop(_storage(inputs), None) is not None
    extra = sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in own)
    return extra, saves_input


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


LATENT_EDGE = 8
"""Image pixels along the edge of one latent pixel."""

_TOKENS: Final = 77
_NO_ADAPTER: Final[Mapping[str, SavedActivations]] = MappingProxyType({})


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass with gradients, computed in `dtype`."""

    height: int  # pixels
    width: int
    batch_size: int
    dtype: torch.dtype
    full: bool  # full fine-tuning instead of an adapter
    checkpointing: bool
    interval: int = 1  # of gradient checkpointing, in layers
    norms_in_float32: bool = False  # whatever `dtype` is, as under torch's autocast on CUDA


@dataclass(frozen=True)
class _Factors:
    """Bytes saved per byte of a layer's size as computed by `_sizes`."""

    residual: float  # block
    transformer: float  # block
    residual_inputs: float  # with the resamplers, norms and projections between the blocks
    transformer_inputs: float


_FACTORS: Final[Mapping[tuple[bool, bool], _Factors]] = {
    (False, False): _Factors(4.35, 20.2, 1.13, 0.95),
    (False, True): _Factors(7.22, 23.2, 1.36, 0.99),
    (True, False): _Factors(5.4, 26.4, 1.51, 0.95),
    (True, True): _Factors(7.6, 32.1, 1.76, 1.0),
}
"""By `full` and `norms_in_float32`: least-squares fits to what torch saves for SDXL's UNet at 512 and 1024 pixels and for the bundled one,
without an adapter, with attention that saves no score matrix."""


@dataclass(frozen=True)
class Activations:
    """Activation memory in bytes."""

    saved: float
    """From the forward to the backward pass."""
    peak: float
    """Of the largest layer while it runs, in addition."""


def activations(
    unet: UNet2DConditionModel,
    forward_pass: ForwardPass,
    adapters: Mapping[str, SavedActivations] = _NO_ADAPTER,
) -> Activations:
    """Return the activation memory of a forward pass; `adapters` is the result of `saved_by_adapters`.

    Each layer saves a fixed number of bytes per number that goes in or out: a residual block by its input and output channels times its
    pixels, a transformer block by its channels times its tokens; adapters add their own. A checkpointed layer saves only its inputs, and
    at its recomputation needs what the largest layer saves otherwise.
    """
    plain = dict(_layers(unet, forward_pass))
    added = dict.fromkeys(plain, 0.0)
    outside = 0.0
    for name, extra in adapters.items():
        size = extra.fixed + extra.per_position * forward_pass.batch_size * _positions(
            name, unet, forward_pass
        )
        layer = _enclosing(name, plain)
        if layer is None:
            outside += size
        else:
            added[layer] += size
    by_layer = {name: size + added[name] for name, size in plain.items()}
    saved = list(by_layer.values())
    if forward_pass.checkpointing:
        interval = forward_pass.interval
        saved[::interval] = list(_inputs(unet, forward_pass))[::interval]
        if NEVER_CHECKPOINTED in list(by_layer)[::interval]:
            outside += added[NEVER_CHECKPOINTED]
    return Activations(sum(saved) + outside, max(by_layer.values()))


def _layers(unet: UNet2DConditionModel, forward_pass: ForwardPass) -> Iterator[tuple[str, float]]:
    """Yield the name of each layer and the bytes it saves without an adapter."""
    factors = _FACTORS[forward_pass.full, forward_pass.norms_in_float32]
    for name, size, is_residual in _sizes(unet, forward_pass):
        yield name, size * (factors.residual if is_residual else factors.transformer)


def _inputs(unet: UNet2DConditionModel, forward_pass: ForwardPass) -> Iterator[float]:
    factors = _FACTORS[forward_pass.full, forward_pass.norms_in_float32]
    for _, size, is_residual in _sizes(unet, forward_pass):
        yield size * (factors.residual_inputs if is_residual else factors.transformer_inputs)


def _enclosing(name: str, layers: Mapping[str, float]) -> str | None:
    """Return which of `layers` contains a layer, or None."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name or None


def _positions(name: str, unet: UNet2DConditionModel, forward_pass: ForwardPass) -> int:
    """Return the number of tokens or latent pixels of one image that a layer takes as input."""
    if takes_text(name):
        return _TOKENS
    if name.endswith("time_emb_proj") or name.startswith(("time_embedding.", "add_embedding.")):
        return 1
    level = 0
    if not name.startswith("conv_"):
        # resamplers follow the layers of their level, and an upsampler interpolates before its convolution
        level = _level(name, len(unet.config.block_out_channels)) - (".upsamplers." in name)
    return _pixels_at_level(forward_pass, level)


def _pixels_at_level(forward_pass: ForwardPass, level: int) -> int:
    edge = LATENT_EDGE << level
    return (forward_pass.height // edge) * (forward_pass.width // edge)


def _sizes(unet: UNet2DConditionModel, forward_pass: ForwardPass) -> Iterator[tuple[str, int, bool]]:
    """Yield for each of `CHECKPOINTED_LAYERS` its name, its size in bytes (channels times positions), and whether it is a residual block."""
    bytes_per_value = forward_pass.batch_size * forward_pass.dtype.itemsize
    for name, layer in unet.named_modules():
        if isinstance(layer, CHECKPOINTED_LAYERS):
            positions = _pixels_at_level(forward_pass, _level(name, len(unet.config.block_out_channels)))
            yield name, bytes_per_value * positions * _channels(layer), isinstance(layer, ResnetBlock2D)


def _channels(layer: nn.Module) -> int:
    if isinstance(layer, ResnetBlock2D):
        return int(layer.in_channels + layer.out_channels)
    assert isinstance(layer, BasicTransformerBlock)
    return int(layer.dim)


def _level(name: str, levels: int) -> int:
    """Return how often the resolution is halved at a layer: once at "down_blocks.1.resnets.0", at "up_blocks.0" as in the middle block."""
    part, _, rest = name.partition(".")
    if part == "mid_block":
        return levels - 1
    number = int(rest.partition(".")[0])
    return number if part == "down_blocks" else levels - 1 - number
