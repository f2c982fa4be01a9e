"""The key rules of the programs that read an adapter's file, restated from their documentation. Each raises for a name it would skip.

Names of the SDXL checkpoint come from `original_layout`, which diffusers' own single-file loader reads back, not from the code under test.
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
    """What a real reader would only log, or not mention at all."""


def sgm_modules(unet: UNet2DConditionModel) -> dict[str, str]:
    """Diffusers' name of each layer with a weight -> its name in an SDXL checkpoint, without `model.diffusion_model`."""
    names = zip(unet.state_dict(), unet_tensors(unet), strict=True)
    return {
        ours.removesuffix(".weight"): theirs.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for ours, theirs in names
        if ours.endswith(".weight")
    }


def read_as_comfyui(
    names: Iterable[str], unet: UNet2DConditionModel, text_layers: int = 32
) -> dict[str, str]:
    """Module in the file -> layer: comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip for SDXL."""
    key_map = {}
    for ours, theirs in sgm_modules(unet).items():
        key_map["lora_unet_" + theirs.replace(".", "_")] = theirs
        key_map["lora_unet_" + ours.replace(".", "_")] = theirs
        key_map["lycoris_" + ours.replace(".", "_")] = theirs
        for prefix in ("", "unet."):
            generic = (prefix + ours).replace(".to_", ".processor.to_")
            key_map[generic.removesuffix(".0") if generic.endswith(".to_out.0") else generic] = theirs
    for layer in range(text_layers):
        for part in TEXT_LAYERS:
            for number in "12":
                name = f"text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
                key_map[f"lora_te{number}_{name}"] = f"clip_{number}.{layer}.{part}"
    suffixes = (*LORA_PARTS, *LYCORIS_PARTS, "lora_A.weight", "lora_B.weight")
    return _matched(names, key_map, suffixes)


def read_as_a1111(names: Iterable[str], unet: UNet2DConditionModel) -> dict[str, str]:
    """Module in the file -> layer: extensions-builtin/Lora/networks.py, with an SDXL checkpoint loaded."""
    layers = {"diffusion_model_" + theirs.replace(".", "_") for theirs in sgm_modules(unet).values()}
    for layer in range(32):
        layers |= {
            f"0_transformer_text_model_encoder_layers_{layer}_{p.replace('.', '_')}" for p in TEXT_LAYERS
        }
        parts = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")
        layers |= {f"1_model_transformer_resblocks_{layer}_{part}" for part in parts}
    found = {}
    unmatched = []
    for name in names:
        module, _, part = name.partition(".")
        key = module.replace("lora_unet", "diffusion_model").replace(
            "lora_te1_text_model", "0_transformer_text_model"
        )
        if second := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", module):
            inner = second[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
            key = f"1_model_transformer_resblocks_{second[1]}_{inner.replace('self_attn', 'attn')}"
            key = key if key in layers else re.sub(r"_[qkv]_proj$", "", key)  # one fused layer there
        if key in layers and part in (*LORA_PARTS, *LYCORIS_PARTS):
            found[module] = key
        else:
            unmatched.append(name)
    _require_none(unmatched)
    return found


def read_as_kohya(names: Iterable[str], unet: UNet2DConditionModel) -> dict[str, str]:
    """Module in the file -> layer: networks/lora.py, create_network_from_weights with the modules of its own SDXL UNet."""
    legal = {}
    for ours, theirs in sgm_modules(unet).items():
        module = unet.get_submodule(ours)
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and re.search(
            r"attentions|resnets|downsamplers|upsamplers", ours
        ):
            legal["lora_unet_" + theirs.replace(".", "_")] = theirs
    for number, layers in (("1", 12), ("2", 32)):
        for layer in range(layers):
            for part in TEXT_LAYERS:
                name = f"lora_te{number}_text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
                legal[name] = name
    return _matched(names, legal, LORA_PARTS)


def _matched(names: Iterable[str], key_map: Mapping[str, str], parts: Iterable[str]) -> dict[str, str]:
    found, unmatched = {}, []
    for name in names:
        part = next((part for part in parts if name.endswith(f".{part}")), None)
        module = name.removesuffix(f".{part}")
        if part is not None and module in key_map:
            found[module] = key_map[module]
        else:
            unmatched.append(name)
    _require_none(unmatched)
    return found


def _require_none(unmatched: list[str]) -> None:
    if unmatched:
        raise UnmatchedKeysError(f"{len(unmatched)} keys are not loaded, as {unmatched[0]}")
