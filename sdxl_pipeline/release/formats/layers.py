"""Adapter files read strictly: every tensor belongs to a layer that the base model has, by a name that its readers know.

Other programs skip names they do not know and still load the rest, so that an adapter is applied in part and images are silently wrong.
Here an unknown name is an error.
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
"""What may follow the dot in kohya's and LyCORIS' key grammar."""

_PEFT_PARTS: Final[Mapping[str, str]] = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_magnitude_vector": NORMS,
}

_SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution of the base model."""

    model: str
    """`unet`, `text_encoder` or `text_encoder_2`."""
    module: str
    """Its name in diffusers' files."""
    shape: tuple[int, ...]
    """Of its weight: (out, in) or (out, in, height, width)."""
    kohya: str | None
    """Its name in kohya's files, with SGM's names for the UNet; None where these have none for it."""


LayerParts = dict[Layer, dict[str, Tensor]]
"""The tensors of each adapted layer by PARTS."""


class LayerTable:
    """Every layer that an adapter's file may name, from the base model's architecture alone."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = tuple(layers)
        self.diffusers = {f"{layer.model}.{layer.module}": layer for layer in self.layers}
        self.kohya = {layer.kohya: layer for layer in self.layers if layer.kohya is not None}
        unet = [layer for layer in self.layers if layer.model == UNET]
        self.lycoris = {f"lycoris_{layer.module.replace('.', '_')}": layer for layer in unet}
        named = sum(layer.kohya is not None for layer in self.layers)
        if len(self.kohya) < named or len(self.lycoris) < len(unet):
            raise FormatError("Two layers of the base model would have one name in kohya's files.")


def layer_table(config_path: str | Path) -> LayerTable:
    """Return the layers of the models whose configurations lie under `config_path`; made on the meta device, without weights."""
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
        # transformers 5 dropped the level `text_model`, which files of every format keep
        inner = name.removeprefix("text_model.")
        if isinstance(module, nn.Linear) and inner.startswith("encoder.layers."):
            name = f"text_model.{inner}"
            kohya = KOHYA_PREFIXES[model] + name.replace(".", "_")
            yield Layer(model, name, tuple(module.weight.shape), kohya)


def read_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], table: LayerTable
) -> LayerParts:
    """Return the layers of a file in diffusers' format; `alpha` comes from `lora_adapter_metadata`, and is the rank without it.

    Raises FormatError for a name that is not a layer's, and for a layer without both factors.
    """
    found: defaultdict[Layer, dict[str, Tensor]] = defaultdict(dict)
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
            found[layer][part] = tensor.reshape(rows) if part == NORMS else tensor
    adapters: dict[str, Any] = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    for layer, parts in found.items():
        if DOWN in parts:
            parts[ALPHA] = torch.tensor(_alpha(layer, parts[DOWN].shape[0], adapters))
    _require_known(unknown)
    return _complete(found)


def read_kohya(tensors: Mapping[str, Tensor], table: LayerTable) -> LayerParts:
    """Return the layers of a file in kohya's key grammar. Raises FormatError for any name that is not exactly of it."""
    return _read_dotted(tensors, table.kohya)


def read_lycoris(tensors: Mapping[str, Tensor], table: LayerTable) -> LayerParts:
    """Return the layers of a file of lycoris-lora, whose names begin with `lycoris_`. Raises FormatError as `read_kohya` does."""
    return _read_dotted(tensors, table.lycoris)


def _read_dotted(tensors: Mapping[str, Tensor], names: Mapping[str, Layer]) -> LayerParts:
    found: defaultdict[Layer, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        module, _, part = name.partition(".")  # at the first dot, as A1111 does
        if module in names and part in PARTS:
            found[names[module]][part] = tensor
        else:
            unknown.append(name)
    _require_known(unknown)
    return _complete(found)


def _alpha(layer: Layer, rank: int, adapters: Mapping[str, Any]) -> float:
    patterns: Mapping[str, float] = adapters.get(f"{layer.model}.alpha_pattern") or {}
    matching = (alpha for end, alpha in patterns.items() if f".{layer.module}".endswith(f".{end}"))
    alpha = float(next(matching, adapters.get(f"{layer.model}.lora_alpha", rank)))
    return alpha * rank**0.5 if adapters.get(f"{layer.model}.use_rslora") else alpha


def _require_known(unknown: list[str]) -> None:
    if unknown:
        raise FormatError(f"{_some(unknown)}: no layer of the base model has this name")


def _complete(found: Mapping[Layer, dict[str, Tensor]]) -> LayerParts:
    lacking = [
        f"{layer.model}.{layer.module} ({lacks})"
        for layer, parts in found.items()
        if (lacks := _missing_part(parts))
    ]
    if lacking:
        raise FormatError(f"{_some(lacking)}: a tensor is missing")
    if not found:
        raise FormatError("The file holds no adapter.")
    return dict(found)


def _missing_part(parts: Mapping[str, Tensor]) -> str | None:
    """Name a tensor without which a layer's update cannot be computed, or whose absence another reader fills with a guess."""
    wanted = [ALPHA]
    if any(part.startswith("lokr_") for part in parts):
        for whole in ("lokr_w1", "lokr_w2"):
            wanted += [whole] if whole in parts else [f"{whole}_a", f"{whole}_b"]
    elif any(part.startswith("hada_") for part in parts):
        wanted += ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        wanted += ["hada_t1", "hada_t2"] if {"hada_t1", "hada_t2"} & parts.keys() else []
    else:
        wanted += [DOWN, UP]
    return next((part for part in wanted if part not in parts), None)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
