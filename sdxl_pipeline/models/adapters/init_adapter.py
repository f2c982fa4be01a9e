"""`init_lora`: initialize a new adapter with the weights of a file."""

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


def load_init_adapter(models: Mapping[str, nn.Module], path: Path) -> None:
    """Initialize the adapters of `models`, by prefix, with the values of a file, so that the models equal those with the file loaded.

    LoRA files of diffusers, PEFT and kohya with any alpha are supported; their strength is preserved. A DoRA may start from a LoRA. Raises
    AdapterError for another kind or rank, other layers, or weights of a model that is not among `models`.
    """
    file = read_header(path)
    network = lycoris_network(models[UNET]) if UNET in models else None
    # kohya's names are the same for a LoRA and for LyCORIS' locon
    kohya = all(name.startswith(KOHYA_PREFIX) for name in file.names)
    if (file.kind == "lycoris" or (kohya and network is not None)) != (network is not None):
        contents, expected = (
            ("a LyCORIS adapter", "lycoris") if network is None else ("no LyCORIS adapter", "standard")
        )
        raise AdapterError(
            f"init_lora: {path} contains {contents}. Set lora_type to {expected}, or init_lora to another file."
        )
    if network is not None:
        _load_lycoris_values(models[UNET], network, path)
    else:
        _load_lora_values(models, file)


def has_text_encoder_weights(path: Path) -> bool:
    """Return whether a file contains an adapter of a text encoder; in kohya's files these names begin with lora_te."""
    return any(name.startswith(("text_encoder", "lora_te")) for name in read_header(path).names)


def _load_lora_values(models: Mapping[str, nn.Module], file: AdapterFile) -> None:
    if any(name.endswith(".dora_scale") for name in file.names):
        raise AdapterError(
            f"init_lora: {file.path} is a DoRA in kohya's format, whose norms diffusers does not read. Set a file in diffusers' format."
        )
    tensors, alphas, metadata = _read_lora(file.path, models.get(UNET))
    for prefix in PREFIXES:
        if prefix not in models and any(name.startswith(f"{prefix}.") for name in tensors):
            switch = "remove train_text_encoder" if prefix == UNET else "set train_text_encoder to true"
            raise AdapterError(
                f"init_lora: {file.path} also contains an adapter of the {display_name(prefix)}, which is not trained; {switch}, or set a "
                "file without it."
            )
    for prefix, model in models.items():
        config: Any = model.peft_config[ADAPTER_NAME]  # type: ignore[index]
        expected = {name: tensor.shape for name, tensor in lora_tensors(model, prefix).items()}
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
        has_norms = any(_MAGNITUDE in name for name in found)
        if has_norms and not config.use_dora:
            raise AdapterError(
                f"init_lora: {file.path} is a DoRA. Set use_dora to true, or init_lora to another file."
            )
        if config.use_dora and not has_norms:
            expected = {name: shape for name, shape in expected.items() if _MAGNITUDE not in name}
        _require_same_tensors(file.path, expected, found)
        _copy_lora(model, prefix, found, _scales(prefix, found, alphas, metadata, file.path))
        if config.use_dora and not has_norms:
            set_magnitudes(model)


def _read_lora(
    path: Path, unet: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Any]]:
    """Return the tensors under PEFT's names, alphas by the names of their `lora_A`, and diffusers' metadata."""
    config = None if unet is None else unet.config  # for kohya's names, which are SGM's
    with lower_case_suffix(path) as safe_path:
        tensors, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(safe_path.parent),
            weight_name=safe_path.name,
            unet_config=config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    down_alphas = {name.removesuffix(".alpha"): float(alpha) for name, alpha in (alphas or {}).items()}
    return _to_peft_names(tensors), _to_peft_names(down_alphas), metadata or {}


def _to_peft_names(values: Mapping[str, V]) -> dict[str, V]:
    """Convert the keys from any format that diffusers reads to PEFT's names after the model's prefix."""
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
    """Return the scale of each layer's update in the file (alpha / rank, or alpha / sqrt(rank) with rslora)."""
    if metadata.get(f"{prefix}.alpha_pattern"):
        raise AdapterError(
            f"init_lora: {path} has a different alpha per layer (alpha_pattern), which is not supported."
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
        layer_name = f"{prefix}.{path}"
        with torch.no_grad():
            layer.lora_A[ADAPTER_NAME].weight.copy_(tensors[f"{layer_name}.lora_A.weight"])
            layer.lora_B[ADAPTER_NAME].weight.copy_(tensors[f"{layer_name}.lora_B.weight"])
            if scales[layer_name] != layer.scaling[ADAPTER_NAME]:
                layer.lora_B[ADAPTER_NAME].weight.mul_(scales[layer_name] / layer.scaling[ADAPTER_NAME])
            if f"{layer_name}.{_MAGNITUDE}" in tensors:
                layer.lora_magnitude_vector[ADAPTER_NAME].weight.copy_(tensors[f"{layer_name}.{_MAGNITUDE}"])


def _load_lycoris_values(model: nn.Module, network: Any, path: Path) -> None:
    tensors = read_lycoris_tensors(path, model)
    current = lycoris_tensors(model)
    _require_same_tensors(path, {name: tensor.shape for name, tensor in current.items()}, tensors)
    for name, tensor in tensors.items():
        if name.endswith(".alpha") and float(tensor) != float(current[name]):
            raise AdapterError(
                f"init_lora: the alpha of {name} in {path} is {float(tensor):g}, and {float(current[name]):g} here. Set linear_alpha (for "
                "convolutions conv_alpha) to that of the file."
            )
    network.load_state_dict(tensors, strict=False)


def _require_same_tensors(
    path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]
) -> None:
    """Raise AdapterError unless the file contains exactly the expected tensors."""
    if missing := sorted(expected.keys() - found.keys()):
        raise AdapterError(
            f"init_lora: {path} contains nothing for {len(missing)} trained tensors, such as {missing[0]}. Set the layers that it was "
            f"trained on in {_TARGETS}."
        )
    if unexpected := sorted(found.keys() - expected.keys()):
        raise AdapterError(
            f"init_lora: {path} contains {len(unexpected)} tensors that are not trained here, such as {unexpected[0]}. Set the layers that it was "
            f"trained on in {_TARGETS}."
        )
    for name, shape in sorted(expected.items()):
        if found[name].shape != shape:
            rank = f" Set lora_rank to {found[name].shape[0]}." if name.endswith("lora_A.weight") else ""
            raise AdapterError(
                f"init_lora: {name} is {tuple(found[name].shape)} in {path}, and {tuple(shape)} here: another rank, or another base "
                f"model.{rank}"
            )


_TARGETS: Final = "lora_target_modules, or for LyCORIS in lycoris_config"
