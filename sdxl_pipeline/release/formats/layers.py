"""Strict reading of adapter files: every tensor must have a known name of a layer of the base model.

Other programs skip unknown names and load the rest, so an adapter is applied only in part and images are wrong without an error. Here an
unknown name is an error.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.adapters.adapter_files import PREFIXES, UNET
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes
from sdxl_pipeline.release.formats import FormatError

KOHYA_PREFIXES: Final[Mapping[str, str]] = dict(
    zip(PREFIXES, ("lora_unet_", "lora_te1_", "lora_te2_"), strict=True)
)
DOWN, UP, MID, ALPHA, NORMS = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"

PARTS: Final = frozenset(
    f"{DOWN} {UP} {MID} {ALPHA} {NORMS} lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 "
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2".split()
)
"""The names of tensors after the dot in kohya's and LyCORIS' key grammar."""

_PEFT_PARTS: Final[Mapping[str, str]] = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_magnitude_vector": NORMS,
}

_MAX_NAMES = 3
"""Names that an error lists."""


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution of the base model."""

    model: str
    """`unet`, `text_encoder` or `text_encoder_2`."""
    module: str
    """Name in diffusers' files."""
    shape: tuple[int, ...]
    """Shape of the weight: (out, in) or (out, in, height, width)."""
    kohya: str | None
    """Name in kohya's files, with SGM's names for the UNet; None if these have no name for the layer."""


LayerParts = dict[Layer, dict[str, Tensor]]
"""The tensors of each adapted layer, by their name in PARTS."""


class LayerTable:
    """Every layer that can be adapted, with its names in each format; derived from the base model's architecture."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = tuple(layers)
        self.diffusers = {f"{layer.model}.{layer.module}": layer for layer in self.layers}
        self.kohya = {layer.kohya: layer for layer in self.layers if layer.kohya is not None}
        unet = [layer for layer in self.layers if layer.model == UNET]
        self.lycoris = {f"lycoris_{layer.module.replace('.', '_')}": layer for layer in unet}
        named = sum(layer.kohya is not None for layer in self.layers)
        if len(self.kohya) < named or len(self.lycoris) < len(unet):
            raise FormatError(
                "Two layers of the base model would have the same name in kohya's or LyCORIS' files."
            )


def layer_table(config_path: str | Path) -> LayerTable:
    """Return the layers of the models with configurations in `config_path`, created on the meta device without weights."""
    folder = Path(config_path)
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(folder, subfolder=UNET)
        unet = UNet2DConditionModel.from_config(config)
        encoders = [
            kind(CLIPTextConfig.from_pretrained(folder / prefix))
            for prefix, kind in zip(PREFIXES[1:], (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
        ]
    return LayerTable(
        [
            *_unet_layers(unet),
            *_text_layers("text_encoder", encoders[0]),
            *_text_layers("text_encoder_2", encoders[1]),
        ]
    )


def _unet_layers(unet: nn.Module) -> Iterable[Layer]:
    prefixes = sgm_prefixes(unet.config)  # type: ignore[arg-type]
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            sgm = sgm_name(name, prefixes)
            kohya = None if sgm is None else KOHYA_PREFIXES[UNET] + sgm.replace(".", "_")
            yield Layer(UNET, name, tuple(module.weight.shape), kohya)


def _text_layers(model: str, encoder: nn.Module) -> Iterable[Layer]:
    for name, module in encoder.named_modules():
        # transformers 5 dropped the prefix `text_model`, which all file formats still have
        inner = name.removeprefix("text_model.")
        if isinstance(module, nn.Linear) and inner.startswith("encoder.layers."):
            name = f"text_model.{inner}"
            kohya = KOHYA_PREFIXES[model] + name.replace(".", "_")
            yield Layer(model, name, tuple(module.weight.shape), kohya)


def read_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], table: LayerTable
) -> LayerParts:
    """Return the layers of a file in diffusers' format; `alpha` comes from `lora_adapter_metadata`, and defaults to the rank.

    Raises FormatError for a name that does not belong to a layer, and for a layer without both factors.
    """
    layers: defaultdict[Layer, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
        suffix = next((suffix for suffix in _PEFT_PARTS if name.endswith(suffix)), None)
        layer = table.diffusers.get(name.removesuffix(suffix)) if suffix else None
        if layer is None or suffix is None:
            unknown.append(name)
        else:
            part = _PEFT_PARTS[suffix]
            rows = (-1, *[1] * (len(layer.shape) - 1))
            layers[layer][part] = tensor.reshape(rows) if part == NORMS else tensor
    adapters: dict[str, Any] = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    for layer, parts in layers.items():
        if DOWN in parts:
            parts[ALPHA] = torch.tensor(_alpha(layer, parts[DOWN].shape[0], adapters))
    _require_known(unknown)
    return _require_complete(layers)


def read_kohya(tensors: Mapping[str, Tensor], table: LayerTable) -> LayerParts:
    """Return the layers of a file in kohya's key grammar. Raises FormatError for any name outside this grammar."""
    return _read_dotted(tensors, table.kohya)


def read_lycoris(tensors: Mapping[str, Tensor], table: LayerTable) -> LayerParts:
    """Return the layers of a file of lycoris-lora, in which names start with `lycoris_`. Raises FormatError for any other name."""
    return _read_dotted(tensors, table.lycoris)


def _read_dotted(tensors: Mapping[str, Tensor], names: Mapping[str, Layer]) -> LayerParts:
    layers: defaultdict[Layer, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        module, _, part = name.partition(".")  # at the first dot, as A1111 does
        if module in names and part in PARTS:
            layers[names[module]][part] = tensor
        else:
            unknown.append(name)
    _require_known(unknown)
    return _require_complete(layers)


def _alpha(layer: Layer, rank: int, adapters: Mapping[str, Any]) -> float:
    patterns: Mapping[str, float] = adapters.get(f"{layer.model}.alpha_pattern") or {}
    matching = (alpha for end, alpha in patterns.items() if f".{layer.module}".endswith(f".{end}"))
    alpha = float(next(matching, adapters.get(f"{layer.model}.lora_alpha", rank)))
    return alpha * rank**0.5 if adapters.get(f"{layer.model}.use_rslora") else alpha


def _require_known(unknown: list[str]) -> None:
    if unknown:
        raise FormatError(f"{_first_names(unknown)}: no layer of the base model has this name")


def _require_complete(layers: Mapping[Layer, dict[str, Tensor]]) -> LayerParts:
    incomplete = [
        f"{layer.model}.{layer.module} ({missing})"
        for layer, parts in layers.items()
        if (missing := _missing_part(parts))
    ]
    if incomplete:
        raise FormatError(f"{_first_names(incomplete)}: a tensor is missing")
    if not layers:
        raise FormatError("The file contains no adapter.")
    return dict(layers)


def _missing_part(parts: Mapping[str, Tensor]) -> str | None:
    """Return the name of a missing tensor that a layer's update needs, or that other programs would replace by a guess; else None."""
    required = [ALPHA]
    if any(part.startswith("lokr_") for part in parts):
        for factor in ("lokr_w1", "lokr_w2"):
            required += [factor] if factor in parts else [f"{factor}_a", f"{factor}_b"]
    elif any(part.startswith("hada_") for part in parts):
        required += ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        required += ["hada_t1", "hada_t2"] if {"hada_t1", "hada_t2"} & parts.keys() else []
    else:
        required += [DOWN, UP]
    return next((part for part in required if part not in parts), None)


def _first_names(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
