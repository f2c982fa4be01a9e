"""Writer of SDXL in the layout of the original single-file checkpoints, the inverse of diffusers' converters.

Names follow Stability AI's generative-models and OpenCLIP; sizes come from the given model, so the bundled one can be written too.
"""

import re
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    per_block = unet.config.layers_per_block + 1

    def rename(name: str) -> str:
        if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name):
            block, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * per_block}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{1 + block * per_block + index}.{_part(kind, rest)}"
        if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name):
            block, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
            if kind == "upsamplers":
                after = 2 if "CrossAttn" in unet.config.up_block_types[block] else 1
                return f"output_blocks.{block * per_block + per_block - 1}.{after}.{rest}"
            return f"output_blocks.{block * per_block + index}.{_part(kind, rest)}"
        for diffusers, original in UNET_ENDS.items():
            if name.startswith(f"{diffusers}."):
                rest = name.removeprefix(f"{diffusers}.")
                return f"{original}.{_resnet(rest) if 'resnets' in diffusers else rest}"
        raise KeyError(name)

    return {f"model.diffusion_model.{rename(name)}": tensor for name, tensor in unet.state_dict().items()}


def vae_tensors(vae: AutoencoderKL, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1

    def rename(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        for diffusers, original in VAE_ATTENTION.items():
            name = name.replace(f"mid_block.attentions.0.{diffusers}.", f"mid.attn_1.{original}.")
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    tensors = {}
    for name, tensor in vae.state_dict().items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # attention was a 1x1 convolution
        tensors[f"{prefix}{rename(name)}"] = tensor
    return tensors


def first_text_tensors(encoder: CLIPTextModel) -> dict[str, Tensor]:
    return {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def second_text_tensors(encoder: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    import torch

    diffusers = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    original = {
        "token_embedding.weight": diffusers["embeddings.token_embedding.weight"],
        "positional_embedding": diffusers["embeddings.position_embedding.weight"],
        "ln_final.weight": diffusers["final_layer_norm.weight"],
        "ln_final.bias": diffusers["final_layer_norm.bias"],
        "text_projection": diffusers["text_projection.weight"].T,
    }
    for name, tensor in diffusers.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            block, part, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if part in OPEN_CLIP:
                original[f"{block}.{OPEN_CLIP[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                stacked = [diffusers[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                original[f"{block}.attn.in_proj_{kind}"] = torch.cat(stacked)
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in original.items()}


def write_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _part(kind: str, rest: str) -> str:
    return f"0.{_resnet(rest)}" if kind == "resnets" else f"1.{rest}"


def _resnet(name: str) -> str:
    part, _, kind = name.partition(".")
    return f"{RESNET[part]}.{kind}"
