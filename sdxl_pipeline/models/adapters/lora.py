"""LoRA and DoRA through PEFT, on the UNet or a text encoder, in files of diffusers' format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.adapter_files import UNET, AdapterError, display_name, lower_case_suffix

ADAPTER_NAME: Final = "default"

_TYPICAL_NAMES = {
    UNET: "The attention projections are to_q, to_k, to_v and to_out.0.",
    "text_encoder": "The attention projections are q_proj, k_proj, v_proj and out_proj.",
}


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    seed: int,
    *,
    use_dora: bool = False,
    init: Literal["default", "gaussian"] = "default",
) -> list[nn.Parameter]:
    """Freeze a UNet or text encoder and give the layers whose names end in `target_modules` a trainable low-rank update.

    Each linear layer becomes W + alpha / rank * B A (Hu et al. 2021) with B (out, rank) zero, so that the model starts unchanged, and
    A (rank, in) uniform as in torch's own linear layers, or normal with standard deviation 1 / rank for `gaussian`. Of a convolution, A
    has its kernel and B is a 1x1 one. With `use_dora`, the rows of the sum are scaled to trainable norms that start as those of W (Liu
    et al. 2024). The parameters, which are returned, are float32 whatever the model's dtype; they depend on `seed` alone, and the global
    random state is left as it was. Raises AdapterError when a target names no layer, or one that is neither linear nor a convolution.
    """
    names = [name for name, _ in model.named_modules()]
    kind = UNET if _is_unet(model) else "text_encoder"
    if absent := [target for target in target_modules if not any(_ends_in(name, target) for name in names)]:
        raise AdapterError(
            f"lora_target_modules: no layer of the {display_name(kind)} ends in {', '.join(map(repr, absent))}. {_TYPICAL_NAMES[kind]}"
        )
    _require_plain_convolutions(model, target_modules, use_dora)
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_dora=use_dora,
        init_lora_weights=True if init == "default" else init,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, adapter_name=ADAPTER_NAME)  # type: ignore[operator]
        except ValueError as error:
            raise AdapterError(f"lora_target_modules: {error}") from error
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        # peft gives them the layer's dtype; small updates would be lost in bf16
        parameter.data = parameter.data.float()
    if use_dora:
        set_magnitudes(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_tensors(model: nn.Module, prefix: str, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """The adapter's tensors by their names in a file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {f"{prefix}.{_name_in_file(model, name)}": tensor for name, tensor in state.items()}


def lora_header(models: Mapping[str, nn.Module], adapter_name: str = ADAPTER_NAME) -> dict[str, str]:
    """Rank, alpha and kind as diffusers' `lora_adapter_metadata`; one that does not read it (before 0.34) takes alpha to be the rank."""
    adapters: dict[str, Any] = {}
    for prefix, model in models.items():
        config: Any = model.peft_config[adapter_name]  # type: ignore[index]
        adapters |= {
            f"{prefix}.r": config.r,
            f"{prefix}.lora_alpha": config.lora_alpha,
            f"{prefix}.target_modules": sorted(config.target_modules),
        }
        if config.use_dora:
            adapters[f"{prefix}.use_dora"] = True
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(adapters, sort_keys=True)}


def load_lora(models: Mapping[str, nn.Module], path: Path, adapter_name: str = ADAPTER_NAME) -> None:
    """Add the adapters of a file to models, by prefix, through diffusers' own loader.

    Files of diffusers, PEFT and kohya are understood; a part for a model that is not given is left aside. Raises AdapterError for a file
    that changes no layer of one of the models.
    """
    unet = models.get(UNET)
    with lower_case_suffix(path) as named:
        state_dict, network_alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(named.parent),
            weight_name=named.name,
            unet_config=None if unet is None else unet.config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    for prefix, model in models.items():
        if not any(name.startswith(f"{prefix}.") for name in state_dict):
            raise AdapterError(f"{path} holds no LoRA for the {display_name(prefix)} of SDXL.")
        how: dict[str, Any] = {
            "network_alphas": network_alphas,
            "adapter_name": adapter_name,
            "metadata": metadata,
        }
        if prefix == UNET:
            StableDiffusionXLPipeline.load_lora_into_unet(state_dict, unet=model, **how)
        else:
            StableDiffusionXLPipeline.load_lora_into_text_encoder(
                state_dict, text_encoder=model, prefix=prefix, **how
            )


def set_magnitudes(model: nn.Module) -> None:
    """Set DoRA's norms to those of W + alpha / rank * B A, so that the model is as without them.

    In float32: peft takes them in the layer's dtype, and rounded to bf16 they would change the model before its first step.
    """
    for layer in lora_layers(model).values():
        layer.lora_magnitude_vector[ADAPTER_NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[ADAPTER_NAME].weight,
            lora_B=layer.lora_B[ADAPTER_NAME].weight,
            scaling=layer.scaling[ADAPTER_NAME],
        )


def _require_plain_convolutions(model: nn.Module, target_modules: Sequence[str], use_dora: bool) -> None:
    """Raise AdapterError for targeted convolutions on which PEFT makes no adapter, or one that is not right."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not any(_ends_in(name, target) for target in target_modules):
            continue
        if type(module) is not nn.Conv2d:
            raise AdapterError(
                f"lora_target_modules: {name} is a convolution held in fewer bits, on which PEFT makes no LoRA. Write "
                "base_model_precision no_change, or leave convolutions out."
            )
        if use_dora and module.weight.dtype != torch.float32:
            raise AdapterError(
                f"use_dora: PEFT takes the norms of a convolution, as {name}, in {module.weight.dtype}, in which they would not match from "
                "the start. Write mixed_precision no, or leave convolutions out of lora_target_modules."
            )


def _name_in_file(model: nn.Module, name: str) -> str:
    # Transformers 5 has dropped this level of the text encoders; every reader knows it, and diffusers drops it again
    flattened = not _is_unet(model) and not name.startswith("text_model.")
    return f"text_model.{name}" if flattened else name


def _is_unet(model: nn.Module) -> bool:
    return hasattr(model, "conv_in")


def _ends_in(name: str, target: str) -> bool:
    # PEFT's own rule: the whole name, or its end after a dot
    return name == target or name.endswith(f".{target}")
