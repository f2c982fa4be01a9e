"""Activations that adapters save for the backward pass in addition to those of the UNet, measured layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.lora import lora_layers
from sdxl_pipeline.models.adapters.lycoris import lycoris_layers, lycoris_network

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
