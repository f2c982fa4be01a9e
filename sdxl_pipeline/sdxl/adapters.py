"""Adapters on the UNet or a text encoder: adding one, and its file.

A file holds the adapters of several models, each under a prefix: `unet`, `text_encoder`, `text_encoder_2`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from sdxl_pipeline.store.stable_safetensors import write_stable_safetensors

ADAPTER_NAME: Final = "default"
UNET: Final = "unet"
PREFIXES: Final = (UNET, "text_encoder", "text_encoder_2")
"""Of tensors in a file, by the model that they belong to; diffusers' own."""

_TYPICAL_NAMES = {
    UNET: "The attention projections are to_q, to_k, to_v and to_out.0.",
    "text_encoder": "The attention projections are q_proj, k_proj, v_proj and out_proj.",
}


class AdapterError(Exception):
    """An adapter that cannot be made or loaded; the message says why."""


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
    kind = UNET if hasattr(model, "conv_in") else "text_encoder"
    if absent := [target for target in target_modules if not any(_ends_in(name, target) for name in names)]:
        raise AdapterError(
            f"lora_target_modules: no layer of the {_spoken(kind)} ends in {', '.join(map(repr, absent))}. {_TYPICAL_NAMES[kind]}"
        )
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
    for parameter in adapter_parameters(model):
        # peft gives them the layer's dtype; small updates would be lost in bf16
        parameter.data = parameter.data.float()
    if use_dora:
        _set_magnitudes(model)
    return adapter_parameters(model)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in the order of the model's modules."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted_module_names(model: nn.Module) -> list[str]:
    """Names of the layers that have an adapter, sorted."""
    return sorted(name for name, module in model.named_modules() if isinstance(module, LoraLayer))


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as the base model has it."""
    model.disable_adapters()  # type: ignore[operator]
    try:
        yield
    finally:
        model.enable_adapters()  # type: ignore[operator]


def save_adapter(
    models: Mapping[str, nn.Module],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Write the adapters of `models`, by prefix, to `path` in diffusers' format, for `StableDiffusionXLPipeline.load_lora_weights`.

    The file is written beside and renamed, and its bytes depend on the weights and `metadata` alone. Rank and alpha stand in its header
    as diffusers' `lora_adapter_metadata`: a loader that does not read that (diffusers before 0.34) takes alpha to be the rank.
    """
    tensors: dict[str, torch.Tensor] = {}
    adapters: dict[str, Any] = {}
    for prefix, model in models.items():
        config: Any = model.peft_config[adapter_name]  # type: ignore[index]
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        tensors |= {f"{prefix}.{_name_in_file(model, name)}": tensor for name, tensor in state.items()}
        adapters |= {
            f"{prefix}.r": config.r,
            f"{prefix}.lora_alpha": config.lora_alpha,
            f"{prefix}.target_modules": sorted(config.target_modules),
        }
        if config.use_dora:
            adapters[f"{prefix}.use_dora"] = True
    header = {**(metadata or {}), LORA_ADAPTER_METADATA_KEY: json.dumps(adapters, sort_keys=True)}
    write_stable_safetensors(path, tensors, header)


def load_adapter(
    models: Mapping[str, nn.Module], path: Path, adapter_name: str = ADAPTER_NAME
) -> dict[str, list[str]]:
    """Add the adapters of a file to `models`, by prefix, that have none of that name yet; gives the names of the layers changed in each.

    Files of diffusers, PEFT and kohya are understood; a part for a model that is not given is left aside. Raises AdapterError for a file
    that changes no layer of one of the models.
    """
    unet = models.get(UNET)
    state_dict, network_alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(path.parent),
        weight_name=path.name,
        unet_config=None if unet is None else unet.config,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    for prefix, model in models.items():
        if not any(name.startswith(f"{prefix}.") for name in state_dict):
            raise AdapterError(f"{path} holds no LoRA for the {_spoken(prefix)} of SDXL.")
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
    return {prefix: adapted_module_names(model) for prefix, model in models.items()}


def _set_magnitudes(model: nn.Module) -> None:
    """DoRA's norms again, from the float32 update: peft took them in the layer's dtype, in which bf16 would change the model's start."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_magnitude_vector[ADAPTER_NAME].update_layer(
                base_layer=module.get_base_layer(),
                lora_A=module.lora_A[ADAPTER_NAME].weight,
                lora_B=module.lora_B[ADAPTER_NAME].weight,
                scaling=module.scaling[ADAPTER_NAME],
            )


def _name_in_file(model: nn.Module, name: str) -> str:
    # Transformers 5 has dropped this level of the text encoders; every reader knows it, and diffusers drops it again
    flattened = not hasattr(model, "conv_in") and not name.startswith("text_model.")
    return f"text_model.{name}" if flattened else name


def _spoken(prefix: str) -> str:
    return "UNet" if prefix == UNET else prefix.replace("_", " ")


def _ends_in(name: str, target: str) -> bool:
    # PEFT's own rule: the whole name, or its end after a dot
    return name == target or name.endswith(f".{target}")


def save_lora(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """`save_adapter` of a UNet alone."""
    save_adapter({UNET: model}, path, metadata)
