"""The key rules of the programs that read adapter files, reimplemented from their documentation; each raises for a key it would skip.

The names of an SDXL checkpoint come from `original_layout`, which diffusers' own single-file loader reads, not from the code under test.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import UNet2DConditionModel

from tests.models.original_layout import unet_tensors

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
TEXT_LAYERS = (*ATTENTION, "mlp.fc1", "mlp.fc2")
LORA_PARTS = ("lora_up.weight", "lora_down.weight", "alpha")
LYCORIS_PARTS = (
    *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    "lora_mid.weight",
)


class UnmatchedKeysError(Exception):
    """Keys that the real program would skip, with only a log message or none."""


def sgm_modules(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return diffusers' name of each layer with a weight -> its name in an SDXL checkpoint, without `model.diffusion_model`."""
    names = zip(unet.state_dict(), unet_tensors(unet), strict=True)
    return {
        name.removesuffix(".weight"): sgm.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for name, sgm in names
        if name.endswith(".weight")
    }


def read_as_comfyui(
    names: Iterable[str], unet: UNet2DConditionModel, text_layers: int = 32
) -> dict[str, str]:
    """Return module in the file -> layer by comfy/lora.py: model_lora_keys_unet and model_lora_keys_clip for SDXL."""
    key_map = {}
    for name, sgm in sgm_modules(unet).items():
        key_map["lora_unet_" + sgm.replace(".", "_")] = sgm
        key_map["lora_unet_" + name.replace(".", "_")] = sgm
        key_map["lycoris_" + name.replace(".", "_")] = sgm
        for prefix in ("", "unet."):
            generic = (prefix + name).replace(".to_", ".processor.to_")
            key_map[generic.removesuffix(".0") if generic.endswith(".to_out.0") else generic] = sgm
    for layer in range(text_layers):
        for part in TEXT_LAYERS:
            for number in "12":
                name = f"text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
                key_map[f"lora_te{number}_{name}"] = f"clip_{number}.{layer}.{part}"
    suffixes = (*LORA_PARTS, *LYCORIS_PARTS, "lora_A.weight", "lora_B.weight")
    return _match(names, key_map, suffixes)


def read_as_a1111(names: Iterable[str], unet: UNet2DConditionModel) -> dict[str, str]:
    """Return module in the file -> layer by extensions-builtin/Lora/networks.py, with an SDXL checkpoint loaded."""
    layers = {"diffusion_model_" + sgm.replace(".", "_") for sgm in sgm_modules(unet).values()}
    for layer in range(32):
        layers |= {
            f"0_transformer_text_model_encoder_layers_{layer}_{p.replace('.', '_')}" for p in TEXT_LAYERS
        }
        parts = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")
        layers |= {f"1_model_transformer_resblocks_{layer}_{part}" for part in parts}
    matched = {}
    unmatched = []
    for name in names:
        module, _, part = name.partition(".")
        key = module.replace("lora_unet", "diffusion_model").replace(
            "lora_te1_text_model", "0_transformer_text_model"
        )
        if second := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", module):
            inner = second[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
            key = f"1_model_transformer_resblocks_{second[1]}_{inner.replace('self_attn', 'attn')}"
            key = key if key in layers else re.sub(r"_[qkv]_proj$", "", key)  # one fused q, k, v layer
        if key in layers and part in (*LORA_PARTS, *LYCORIS_PARTS):
            matched[module] = key
        else:
            unmatched.append(name)
    _require_none(unmatched)
    return matched


def read_as_kohya(names: Iterable[str], unet: UNet2DConditionModel) -> dict[str, str]:
    """Return module in the file -> layer by networks/lora.py: create_network_from_weights with its own SDXL UNet."""
    key_map = {}
    for name, sgm in sgm_modules(unet).items():
        module = unet.get_submodule(name)
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and re.search(
            r"attentions|resnets|downsamplers|upsamplers", name
        ):
            key_map["lora_unet_" + sgm.replace(".", "_")] = sgm
    for number, layers in (("1", 12), ("2", 32)):
        for layer in range(layers):
            for part in TEXT_LAYERS:
                name = f"lora_te{number}_text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
                key_map[name] = name
    return _match(names, key_map, LORA_PARTS)


def _match(names: Iterable[str], key_map: Mapping[str, str], parts: Iterable[str]) -> dict[str, str]:
    matched, unmatched = {}, []
    for name in names:
        part = next((part for part in parts if name.endswith(f".{part}")), None)
        module = name.removesuffix(f".{part}")
        if part is not None and module in key_map:
            matched[module] = key_map[module]
        else:
            unmatched.append(name)
    _require_none(unmatched)
    return matched


def _require_none(unmatched: list[str]) -> None:
    if unmatched:
        raise UnmatchedKeysError(f"{len(unmatched)} keys are not loaded, such as {unmatched[0]}")
