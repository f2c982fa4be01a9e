"""What adapted layers keep of a forward pass for the backward one, beside what a UNet without an adapter keeps: asked of the layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.lora import lora_layers
from sdxl_pipeline.models.adapters.lycoris import lycoris_layers, lycoris_network

_SIDES: Final = (4, 8)
"""Of what the layers are asked with: tokens, or pixels along an edge. Two, since some is kept for each of them and some whatever goes in."""

_ATTENDED: Final = "what attention gives"

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SavedActivations:
    """Bytes that an adapted layer keeps beyond those of the layer without its adapter."""

    by_place: float
    """For each token or pixel that goes in, of one image."""
    once: float
    """For a pass, whatever goes in: weights that are rebuilt or cast."""


def saved_by_adapters(unet: nn.Module, dtype: torch.dtype) -> dict[str, SavedActivations]:
    """For each adapted layer of a UNet that computes in `dtype`, by its name; none where there is no adapter.

    Of each kind and size of layer one runs, on a few zeros. An input that is kept as it is counts for the first of the layers that have
    it in common, and what attention gives to its last projection for none, since attention itself keeps that.
    """
    answers: dict[tuple[Any, ...], tuple[SavedActivations, float]] = {}
    counted = {_ATTENDED}
    kept: dict[str, SavedActivations] = {}
    for name, adapted, plain, base in _adapted_layers(unet):
        key = (*_size(base), *(tuple(parameter.shape) for parameter in adapted.parameters()))
        if key not in answers:
            answers[key] = _ask(adapted, plain, base, dtype)
        kept[name], of_input = answers[key]
        if of_input and (source := _source(name)) not in counted:
            counted.add(source)
            kept[name] = SavedActivations(kept[name].by_place + of_input, kept[name].once)
    return kept


def takes_text(name: str) -> bool:
    """Whether a layer of this name has the prompt's tokens for its input."""
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def _source(name: str) -> str:
    """Where a layer's input comes from: the same for those that have it in common."""
    if name.endswith("to_out.0"):
        return _ATTENDED
    if takes_text(name):
        return "the text"
    return name.rpartition(".")[0] if name.endswith((".to_q", ".to_k", ".to_v")) else name


def _adapted_layers(unet: nn.Module) -> Iterator[tuple[str, Any, Layer, Any]]:
    """(name, the layer with its adapter, what it calls without it, the layer that holds the weight)."""
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


def _ask(adapted: Any, plain: Layer, base: nn.Module, dtype: torch.dtype) -> tuple[SavedActivations, float]:
    """What a layer keeps beside its input, and the bytes of one place of its input if it keeps that."""
    some = next(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    own = {_storage(held) for layer in (adapted, base) for held in chain(layer.parameters(), layer.buffers())}
    width, *_ = _size(base)
    is_convolution = isinstance(base, nn.Conv2d)
    extra, keeps_input = [], False
    with _as_in_training(adapted), torch.autocast(some.device.type, dtype, enabled=dtype != torch.float32):
        for side in _SIDES:
            shape = (1, width, side, side) if is_convolution else (1, side, width)
            inputs = some.new_zeros(shape, dtype=dtype)
            saved, keeps_input = _saved(adapted, inputs, own)
            extra.append(saved - _saved(plain, inputs, own)[0])
    few, many = (side * side if is_convolution else side for side in _SIDES)
    by_place = (extra[1] - extra[0]) / (many - few)
    return SavedActivations(by_place, extra[0] - few * by_place), keeps_input * width * dtype.itemsize


@contextmanager
def _as_in_training(adapted: Any) -> Iterator[None]:
    """With dropout, but for LyCORIS' of whole layers; the random state is left as it was."""
    was_training, left_out = adapted.training, getattr(adapted, "module_dropout", None)
    device = next(adapted.parameters()).device
    adapted.train()
    if left_out:
        adapted.module_dropout = 0.0
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        adapted.train(was_training)
        if left_out:
            adapted.module_dropout = left_out


def _saved(layer: Layer, inputs: Tensor, own: set[int]) -> tuple[int, bool]:
    """Bytes that autograd saves of one pass beside its input and the storages `own`; and whether it saves its input."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(_storage(tensor), tensor)
        return tensor

    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs)
    keeps_input = saved.pop(_storage(inputs), None) is not None
    return sum(
        held.untyped_storage().nbytes() for place, held in saved.items() if place not in own
    ), keeps_input


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
