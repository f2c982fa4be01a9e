"""`init_lora`: a new adapter that starts as one in a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.adapter_files import (
    PREFIXES,
    UNET,
    AdapterError,
    AdapterFile,
    display_name,
    lower_case_suffix,
    read_header,
)
from sdxl_pipeline.models.adapters.lora import ADAPTER_NAME, lora_layers, lora_tensors, set_magnitudes
from sdxl_pipeline.models.adapters.lycoris import (
    KOHYA_PREFIX,
    lycoris_network,
    lycoris_tensors,
    read_lycoris_tensors,
)

V = TypeVar("V")

_MAGNITUDE: Final = "lora_magnitude_vector"


def start_from_file(models: Mapping[str, nn.Module], path: Path) -> None:
    """Give the adapters of `models`, by prefix, the values that a file holds for them; the models are then as with the file loaded.

    A LoRA's file may be diffusers', PEFT's or kohya's, of any alpha: its strength is kept. A DoRA may start from a LoRA. Raises AdapterError
    for a file of another kind or rank, of other layers, or with a part for a model that is not among `models`.
    """
    file = read_header(path)
    network = lycoris_network(models[UNET]) if UNET in models else None
    kohya = all(
        name.startswith(KOHYA_PREFIX) for name in file.names
    )  # a LoRA or LyCORIS' locon: the same tensors
    if (file.kind == "lycoris" or (kohya and network is not None)) != (network is not None):
        held, wanted = (
            ("a LyCORIS adapter", "lycoris") if network is None else ("no LyCORIS adapter", "standard")
        )
        raise AdapterError(f"init_lora: {path} holds {held}. Write lora_type {wanted}, or name another file.")
    if network is not None:
        _start_lycoris(models[UNET], network, path)
    else:
        _start_lora(models, file)


def has_text_part(path: Path) -> bool:
    """Whether a file holds an adapter of a text encoder as well; in kohya's files these begin with lora_te."""
    return any(name.startswith(("text_encoder", "lora_te")) for name in read_header(path).names)


def _start_lora(models: Mapping[str, nn.Module], file: AdapterFile) -> None:
    if any(name.endswith(".dora_scale") for name in file.names):
        raise AdapterError(
            f"init_lora: {file.path} is a DoRA in kohya's format, whose norms diffusers does not read. Name a file in diffusers' format."
        )
    tensors, alphas, metadata = _read_lora(file.path, models.get(UNET))
    for prefix in PREFIXES:
        if prefix not in models and any(name.startswith(f"{prefix}.") for name in tensors):
            switch = "leave train_text_encoder out" if prefix == UNET else "write train_text_encoder true"
            raise AdapterError(
                f"init_lora: {file.path} holds an adapter of the {display_name(prefix)} as well, which is not trained; {switch}, or name a "
                "file without it."
            )
    for prefix, model in models.items():
        config: Any = model.peft_config[ADAPTER_NAME]  # type: ignore[index]
        wanted = {name: tensor.shape for name, tensor in lora_tensors(model, prefix).items()}
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
        holds_norms = any(_MAGNITUDE in name for name in found)
        if holds_norms and not config.use_dora:
            raise AdapterError(
                f"init_lora: {file.path} is a DoRA. Write use_dora true, or name another file."
            )
        if config.use_dora and not holds_norms:
            wanted = {name: shape for name, shape in wanted.items() if _MAGNITUDE not in name}
        _require_same(file.path, wanted, found)
        _copy_lora(model, prefix, found, _scales(prefix, found, alphas, metadata, file.path))
        if config.use_dora and not holds_norms:
            set_magnitudes(model)


def _read_lora(
    path: Path, unet: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any]]:
    """The tensors by the names that our own files give them, alphas by those of their `lora_A`, and diffusers' metadata."""
    config = None if unet is None else unet.config  # for the names of kohya's trainer, which are SGM's
    with lower_case_suffix(path) as named:
        tensors, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(named.parent),
            weight_name=named.name,
            unet_config=config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    of_down = {name.removesuffix(".alpha"): float(alpha) for name, alpha in (alphas or {}).items()}
    return _renamed(tensors), _renamed(of_down), metadata or {}


def _renamed(values: Mapping[str, V]) -> dict[str, V]:
    """From the names of any format that diffusers reads to PEFT's, each after its model's prefix."""
    renamed: dict[str, V] = {}
    for prefix in PREFIXES:
        start = f"{prefix}."
        part = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
        if prefix == UNET and not any("lora_A" in name for name in part):
            part = convert_unet_state_dict_to_peft(part)
        elif prefix != UNET and part:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
            part = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in part.items()}
        renamed |= {start + name: value for name, value in part.items()}
    return renamed


def _scales(
    prefix: str,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    metadata: Mapping[str, Any],
    path: Path,
) -> dict[str, float]:
    """What the file's updates are multiplied by, by layer."""
    if metadata.get(f"{prefix}.alpha_pattern"):
        raise AdapterError(
            f"init_lora: {path} has another alpha for each layer (alpha_pattern), which is not read."
        )
    root = math.sqrt if metadata.get(f"{prefix}.use_rslora") else float
    scales = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer, rank = name.removesuffix(".lora_A.weight"), tensor.shape[0]
            alpha = alphas.get(name, metadata.get(f"{prefix}.lora_alpha", rank))
            scales[layer] = alpha / root(rank)
    return scales


def _copy_lora(
    model: nn.Module, prefix: str, tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> None:
    for name, layer in lora_layers(model).items():
        path = name if prefix == UNET else f"text_model.{name.removeprefix('text_model.')}"
        place = f"{prefix}.{path}"
        with torch.no_grad():
            layer.lora_A[ADAPTER_NAME].weight.copy_(tensors[f"{place}.lora_A.weight"])
            layer.lora_B[ADAPTER_NAME].weight.copy_(tensors[f"{place}.lora_B.weight"])
            if scales[place] != layer.scaling[ADAPTER_NAME]:
                layer.lora_B[ADAPTER_NAME].weight.mul_(scales[place] / layer.scaling[ADAPTER_NAME])
            if f"{place}.{_MAGNITUDE}" in tensors:
                layer.lora_magnitude_vector[ADAPTER_NAME].weight.copy_(tensors[f"{place}.{_MAGNITUDE}"])


def _start_lycoris(model: nn.Module, network: Any, path: Path) -> None:
    tensors = read_lycoris_tensors(path, model)
    own = lycoris_tensors(model)
    _require_same(path, {name: tensor.shape for name, tensor in own.items()}, tensors)
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and float(tensor) != float(own[name]):
            raise AdapterError(
                f"init_lora: the alpha in {path} is {float(tensor):g}, and {float(own[name]):g} here, in {name}. Write linear_alpha (of "
                "convolutions conv_alpha) as it was."
            )
    network.load_state_dict(tensors, strict=False)


def _require_same(path: Path, wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> None:
    """Raise AdapterError unless the file holds exactly the wanted tensors."""
    if lacking := sorted(wanted.keys() - found.keys()):
        raise AdapterError(
            f"init_lora: {path} holds nothing for {len(lacking)} tensors that are trained here, as {lacking[0]}. Name the layers that it "
            f"was trained on in {_TARGETS}."
        )
    if more := sorted(found.keys() - wanted.keys()):
        raise AdapterError(
            f"init_lora: {path} holds {len(more)} tensors that are not trained here, as {more[0]}. Name the layers that it was trained on "
            f"in {_TARGETS}."
        )
    for name, shape in sorted(wanted.items()):
        if found[name].shape != shape:
            rank = f" Write lora_rank {found[name].shape[0]}." if name.endswith("lora_A.weight") else ""
            raise AdapterError(
                f"init_lora: {name} is {tuple(found[name].shape)} in {path}, and {tuple(shape)} here: another rank, or another base "
                f"model.{rank}"
            )


_TARGETS: Final = "lora_target_modules, or for LyCORIS in lycoris_config"
