"""Conversion of diffusers' SDXL components to the tensor names and shapes of SDXL's original single-file checkpoints.

Every function takes a component's state dict and yields (name, tensor) one by one, so that a lazy one is never loaded as a whole; on the
meta device the same functions give names and shapes. Names follow Stability AI's generative-models and, for the second text encoder,
open_clip; together they are the 2,515 names of sd_xl_base_1.0.safetensors.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from sdxl_pipeline.models.model_files import SINGLE_FILE_PREFIXES
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes

_VAE_PARTS: Final = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_OPEN_CLIP_PARTS: Final[Mapping[str, str]] = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
LOGIT_SCALE: Final = math.log(100)
"""Temperature of open_clip's models; SDXL does not use it, but strict readers require it."""


def unet_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a UNet with this config.json. Raises KeyError for a name that SDXL's UNet does not have."""
    prefixes = sgm_prefixes(config)
    for name in state:
        original = sgm_name(name, prefixes)
        if original is None:
            raise KeyError(name)
        yield f"{SINGLE_FILE_PREFIXES['unet']}{original}", state[name]


def vae_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the VAE's tensors; its attention projections are 1x1 convolutions in the original layout."""
    last = max(int(match[1]) for name in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    for name in state:
        # the original counts the decoder's resolutions from the finest
        original = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{last - int(match[1])}.", name)
        for pattern, replacement in _VAE_PARTS:
            original = re.sub(pattern, replacement, original)
        tensor = state[name]
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        yield f"{SINGLE_FILE_PREFIXES['vae']}{original}", tensor


def first_text_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of CLIP-L, which keeps transformers' names; the int64 position ids come first, so that they are aligned."""
    prefix = f"{SINGLE_FILE_PREFIXES['text_encoder']}transformer.text_model."
    stored_names = {name.removeprefix("text_model."): name for name in state}
    positions = state[stored_names["embeddings.position_embedding.weight"]]
    yield f"{prefix}embeddings.position_ids", torch.arange(len(positions), device=positions.device)[None]
    for name, stored in stored_names.items():
        yield f"{prefix}{name}", state[stored]


def second_text_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of CLIP-bigG in open_clip's layout: fused q, k, v, and the projection as a right-multiplied matrix."""
    prefix = f"{SINGLE_FILE_PREFIXES['text_encoder_2']}model."
    stored_names = {name.removeprefix("text_model."): name for name in state}
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for name, stored in stored_names.items():
        if name in fixed:
            yield f"{prefix}{fixed[name]}", state[stored]
        elif name == "text_projection.weight":
            yield f"{prefix}text_projection", state[stored].T
            yield f"{prefix}logit_scale", torch.full_like(state[stored][0, 0], LOGIT_SCALE)
        elif not (match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            raise KeyError(name)
        else:
            block, part, kind = f"{prefix}transformer.resblocks.{match[1]}", match[2], match[3]
            if part == "self_attn.q_proj":
                fused = [state[stored_names[name.replace("q_proj", f"{letter}_proj")]] for letter in "qkv"]
                yield f"{block}.attn.in_proj_{kind}", torch.cat(fused)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                yield f"{block}.{_OPEN_CLIP_PARTS[part]}.{kind}", state[stored]


def second_text_weight(module: str) -> tuple[str, int | None]:
    """Return the original name of the weight of CLIP-bigG's `encoder.layers.<n>.<part>`, and its third of a fused q, k, v weight, or None."""
    number, _, part = module.removeprefix("encoder.layers.").partition(".")
    block = f"{SINGLE_FILE_PREFIXES['text_encoder_2']}model.transformer.resblocks.{number}"
    third = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}.get(part)
    return (
        f"{block}.attn.in_proj_weight" if third is not None else f"{block}.{_OPEN_CLIP_PARTS[part]}.weight",
        third,
    )
