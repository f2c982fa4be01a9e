"""The update that an adapter adds to a layer's weight, computed from a file's tensors as other programs compute it.

Formulas: LoRA (Hu et al. 2021), LoHa and LoKr (Yeh et al. 2023, arXiv:2309.14859), weight decomposition (Liu et al. 2024).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_pipeline.models.adapters.adapter_files import UNET
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders
from sdxl_pipeline.models.model_files import SINGLE_FILE_PREFIXES, choose_component
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.layers import ALPHA, DOWN, MID, NORMS, UP, Layer, LayerParts


def update_of(layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the update of a layer without weight decomposition, float32 of the weight's shape.

    Raises FormatError with the layer's name for tensors that do not fit the layer or each other.
    """
    values = {name: tensor.float() for name, tensor in parts.items()}
    if values[ALPHA].ndim:
        raise FormatError(
            f"{layer.module}: alpha has the shape {tuple(values[ALPHA].shape)}; it must be a scalar"
        )
    alpha = float(values[ALPHA])
    rank: int | None
    try:
        if "hada_w1_a" in values:
            update, rank = _loha(values)
        elif any(name.startswith("lokr_") for name in values):
            update, rank = _lokr(values)
        else:
            update, rank = _lora(values, len(layer.shape))
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"{layer.module}: its tensors do not fit each other: {error}") from error
    scale = 1.0 if rank is None else alpha / rank
    flat = (layer.shape[0], layer.shape[1] * _kernel(layer))
    if tuple(update.shape) not in (layer.shape, flat):
        raise FormatError(
            f"{layer.module}: its update has the shape {tuple(update.shape)}, but the layer's weight has {layer.shape}"
        )
    return scale * update.reshape(layer.shape)


def decomposed(weight: Tensor, update: Tensor, norms: Tensor) -> Tensor:
    """Return the update of a weight-decomposed layer, m (W + U) / ||W + U|| - W with norms over rows, in float32."""
    updated = weight + update
    row_norms = updated.flatten(1).norm(dim=1).reshape(norms.shape)
    return norms.float() / row_norms.clamp_min(torch.finfo(torch.float32).eps) * updated - weight


def updates(layers: LayerParts, base: "BaseWeights | None" = None) -> Iterator[tuple[Layer, Tensor]]:
    """Yield each layer's update; weight-decomposed layers need `base`, else FormatError is raised."""
    for layer, parts in layers.items():
        update = update_of(layer, parts)
        if NORMS in parts:
            if base is None:
                raise FormatError(f"{layer.module}: the base model's weight is needed for its norms")
            update = decomposed(base.weight(layer), update, parts[NORMS])
        yield layer, update


class BaseWeights:
    """Weights of the base model's layers, read one at a time so that the model need not fit into memory."""

    def __init__(self, model: ResolvedModel) -> None:
        self._model = model
        self._files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._files.close()

    def weight(self, layer: Layer) -> Tensor:
        """Return a layer's weight in float32. Raises FormatError if the base model has no such tensor."""
        if layer.model != UNET:
            encoder = getattr(self._encoders, layer.model)
            names = dict(encoder.named_modules())
            module = names.get(layer.module) or names[layer.module.removeprefix("text_model.")]
            return torch.as_tensor(module.weight).float()
        return self.unet_tensor(f"{layer.module}.weight")

    def unet_tensor(self, name: str) -> Tensor:
        """Return the UNet's tensor of this name in diffusers' files, in float32. Raises FormatError if there is none."""
        module, _, kind = name.rpartition(".")
        stored = f"{self._unet_name(module)}.{kind}"
        if stored not in self._unet:
            raise FormatError(f"{self._model.source} has no tensor {stored}")
        return torch.as_tensor(self._unet[stored].get_tensor(stored)).float()

    def _unet_name(self, module: str) -> str:
        if self._model.kind == "folder":
            return module
        return f"{SINGLE_FILE_PREFIXES[UNET]}{sgm_name(module, self._prefixes)}"

    @cached_property
    def _prefixes(self) -> dict[str, str]:
        from diffusers import UNet2DConditionModel

        return sgm_prefixes(UNet2DConditionModel.load_config(self._model.config_path, subfolder=UNET))

    @cached_property
    def _unet(self) -> dict[str, Any]:
        """The open file of each tensor, by the tensor's name."""
        root = Path(self._model.path)
        paths = [root]
        if self._model.kind == "folder":
            names = [path.relative_to(root).as_posix() for path in (root / UNET).iterdir()]
            chosen = choose_component(names, UNET, self._model.source).weights
            paths = [root / name for name in chosen if name.endswith(".safetensors")]
        files = [self._files.enter_context(safe_open(path, framework="pt")) for path in paths]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    @cached_property
    def _encoders(self) -> Any:
        return load_text_encoders(self._model, torch.float32)


def _lora(parts: Mapping[str, Tensor], axes: int) -> tuple[Tensor, int]:
    down, up = parts[DOWN], parts[UP]
    if down.ndim != axes or up.ndim != axes or any(size != 1 for size in up.shape[2:]):
        raise ValueError(f"lora_down is {tuple(down.shape)}, lora_up {tuple(up.shape)}")
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"lora_down has rank {down.shape[0]}, lora_up {up.shape[1]}")
    if MID in parts:
        return _tucker(parts[MID], up.flatten(1).T, down.flatten(1)), down.shape[0]
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]), down.shape[0]


def _loha(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    factors = []
    for number in "12":
        first, second = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        core = parts.get(f"hada_t{number}")
        factors.append(first @ second if core is None else _tucker(core, first, second))
    return factors[0] * factors[1], parts["hada_w1_b"].shape[0]


def _lokr(parts: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    rank = None
    factors = []
    for number in "12":
        factor = parts.get(f"lokr_w{number}")
        if factor is None:
            first, second = parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"]
            rank = second.shape[0]
            core = parts.get("lokr_t2") if number == "2" else None
            factor = first @ second.flatten(1) if core is None else _tucker(core, first, second)
        factors.append(factor)
    left, right = factors
    return torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - left.ndim)), right.contiguous()), rank


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """Return the Tucker product (O, I, kernel) of core (r, r, kernel), out (r, O) and into (r, I)."""
    return torch.einsum("ij...,ip,jq->pq...", core, out, into)


def _kernel(layer: Layer) -> int:
    size = 1
    for edge in layer.shape[2:]:
        size *= edge
    return size
