"""LoRA and DoRA by PEFT, on the UNet or a text encoder, and their files in diffusers' format."""

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
    """Freeze a UNet or text encoder and add trainable low-rank updates to the layers whose names end in `target_modules`.

    Each linear layer becomes W + alpha / rank * B A (Hu et al. 2021) with B (out, rank) zero, so that the model starts unchanged, and
    A (rank, in) uniform as in torch's own linear layers, or normal with standard deviation 1 / rank for `gaussian`. For a convolution, A
    has its kernel size and B is 1x1. With `use_dora`, the rows of the sum are scaled to trainable norms that are initialized with those of
    W (Liu et al. 2024). The returned parameters are float32 for any dtype of the model; they depend only on `seed`, and the global random
    state is unchanged. Raises AdapterError when a target matches no layer, or one that is neither linear nor a convolution.
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
        # peft creates them in the layer's dtype; small updates would be lost in bf16
        parameter.data = parameter.data.float()
    if use_dora:
        set_magnitudes(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def lora_tensors(model: nn.Module, prefix: str, adapter_name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in a file."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {f"{prefix}.{_name_in_file(model, name)}": tensor for name, tensor in state.items()}


def lora_header(models: Mapping[str, nn.Module], adapter_name: str = ADAPTER_NAME) -> dict[str, str]:
    """Return rank, alpha and kind as diffusers' `lora_adapter_metadata`; older readers (before 0.34) assume that alpha is the rank."""
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
    """Add the adapters of a file to models, by prefix, with diffusers' own loader.

    Files of diffusers, PEFT and kohya are supported; weights for a model that is not given are ignored. Raises AdapterError for a file
    that changes no layer of one of the models.
    """
    unet = models.get(UNET)
    with lower_case_suffix(path) as safe_path:
        state_dict, network_alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(safe_path.parent),
            weight_name=safe_path.name,
            unet_config=None if unet is None else unet.config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
    for prefix, model in models.items():
        if not any(name.startswith(f"{prefix}.") for name in state_dict):
            raise AdapterError(f"{path} contains no LoRA for the {display_name(prefix)} of SDXL.")
        load_options: dict[str, Any] = {
            "network_alphas": network_alphas,
            "adapter_name": adapter_name,
            "metadata": metadata,
        }
        if prefix == UNET:
            StableDiffusionXLPipeline.load_lora_into_unet(state_dict, unet=model, **load_options)
        else:
            StableDiffusionXLPipeline.load_lora_into_text_encoder(
                state_dict, text_encoder=model, prefix=prefix, **load_options
            )


def set_magnitudes(model: nn.Module) -> None:
    """Set DoRA's norms to those of W + alpha / rank * B A, so that the model equals the one without norms.

    In float32: peft computes them in the layer's dtype, and rounding to bf16 would change the model before the first step.
    """
    for layer in lora_layers(model).values():
        layer.lora_magnitude_vector[ADAPTER_NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[ADAPTER_NAME].weight,
            lora_B=layer.lora_B[ADAPTER_NAME].weight,
            scaling=layer.scaling[ADAPTER_NAME],
        )


def _require_plain_convolutions(model: nn.Module, target_modules: Sequence[str], use_dora: bool) -> None:
    """Raise AdapterError for targeted convolutions on which PEFT adds no adapter, or an incorrect one."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not any(_ends_in(name, target) for target in target_modules):
            continue
        if type(module) is not nn.Conv2d:
            raise AdapterError(
                f"lora_target_modules: {name} is a quantized convolution, on which PEFT adds no LoRA. Set base_model_precision to "
                "no_change, or remove convolutions."
            )
        if use_dora and module.weight.dtype != torch.float32:
            raise AdapterError(
                f"use_dora: PEFT computes the norms of convolutions such as {name} in {module.weight.dtype}, which changes the model before "
                "the first step. Set mixed_precision to no, or remove convolutions from lora_target_modules."
            )


def _name_in_file(model: nn.Module, name: str) -> str:
    # Transformers 5 removed this level of the text encoders; every reader accepts it, and diffusers strips it
    flattened = not _is_unet(model) and not name.startswith("text_model.")
    return f"text_model.{name}" if flattened else name


def _is_unet(model: nn.Module) -> bool:
    return hasattr(model, "conv_in")


def _ends_in(name: str, target: str) -> bool:
    # PEFT's rule: the full name, or its end after a dot
    return name == target or name.endswith(f".{target}")
