"""LoRA on the UNet: adding it, and its file in diffusers' format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from sdxl_pipeline.store.stable_safetensors import write_stable_safetensors

ADAPTER_NAME = "default"
_PREFIX = "unet"


class AdapterError(Exception):
    """An adapter that cannot be made or loaded; the message says why."""


def add_lora(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    seed: int,
) -> list[torch.nn.Parameter]:
    """Freeze the UNet and give the layers whose names end in `target_modules` a trainable low-rank update (Hu et al. 2021).

    Each becomes W + alpha / rank * B A, with A (rank, in) uniform as in torch's own linear layers, and B (out, rank) zero, so that the
    model starts unchanged. The parameters, which are returned, are float32 whatever the UNet's dtype; they depend on `seed` alone, and
    the global random state is left as it was. Raises AdapterError when a target names no layer.
    """
    names = [name for name, _ in unet.named_modules()]
    if absent := [target for target in target_modules if not any(_ends_in(name, target) for name in names)]:
        raise AdapterError(
            f"lora_target_modules: no layer of the UNet ends in {', '.join(map(repr, absent))}. "
            "The attention projections are to_q, to_k, to_v and to_out.0."
        )
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER_NAME)
    parameters = lora_parameters(unet)
    for parameter in parameters:
        # peft gives them the layer's dtype; small updates would be lost in bf16
        parameter.data = parameter.data.float()
    return parameters


def lora_parameters(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """The trainable parameters, in the order of the UNet's modules."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def adapted_module_names(unet: UNet2DConditionModel) -> list[str]:
    """Names of the layers that have an adapter, sorted."""
    return sorted(name for name, module in unet.named_modules() if isinstance(module, LoraLayer))


def save_lora(
    unet: UNet2DConditionModel,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Write the adapter to `path` in diffusers' format, for `StableDiffusionXLPipeline.load_lora_weights`.

    The file is written beside and renamed, and its bytes depend on the weights and `metadata` alone. Rank and alpha stand in its header
    as diffusers' `lora_adapter_metadata`: a loader that does not read that (diffusers before 0.34) takes alpha to be the rank.
    """
    config = unet.peft_config[adapter_name]
    tensors = {
        f"{_PREFIX}.{name}": tensor
        for name, tensor in get_peft_model_state_dict(unet, adapter_name=adapter_name).items()
    }
    adapter = {
        f"{_PREFIX}.r": config.r,
        f"{_PREFIX}.lora_alpha": config.lora_alpha,
        f"{_PREFIX}.target_modules": sorted(config.target_modules),
    }
    header = {**(metadata or {}), LORA_ADAPTER_METADATA_KEY: json.dumps(adapter, sort_keys=True)}
    write_stable_safetensors(path, tensors, header)


def load_lora_into_unet(
    unet: UNet2DConditionModel, path: Path, adapter_name: str = ADAPTER_NAME
) -> list[str]:
    """Add the adapter of a LoRA file to a UNet that has none of that name, and give the names of the layers it changes.

    Files of diffusers, PEFT and kohya are understood; a text encoder's part in them is left aside. Raises AdapterError for a file that
    changes no layer of the UNet.
    """
    state_dict, network_alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        str(path.parent),
        weight_name=path.name,
        unet_config=unet.config,
        use_safetensors=True,
        local_files_only=True,
        return_lora_metadata=True,
    )
    if not any(name.startswith(f"{_PREFIX}.") for name in state_dict):
        raise AdapterError(f"{path} holds no LoRA for the UNet of SDXL.")
    StableDiffusionXLPipeline.load_lora_into_unet(
        state_dict, network_alphas=network_alphas, unet=unet, adapter_name=adapter_name, metadata=metadata
    )
    return adapted_module_names(unet)


def _ends_in(name: str, target: str) -> bool:
    # PEFT's own rule: the whole name, or its end after a dot
    return name == target or name.endswith(f".{target}")
