"""Layer names of the UNet in Stability AI's `generative-models` (SGM), derived from the architecture. No torch.

ComfyUI, A1111, Forge and kohya's trainers use SGM's layer names. The mapping follows from the numbers of blocks and layers, so it also
holds for models smaller than SDXL-base, such as the bundled one.
"""

from collections.abc import Mapping
from typing import Any, Final

_ENDS: Final[Mapping[str, str]] = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

_RESNET: Final[Mapping[str, str]] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sgm_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Return diffusers prefix -> SGM prefix for a UNet's config.json, longest prefix first.

    Residual blocks are mapped to their last part; within a transformer the names are the same.
    """
    down, up = config["down_block_types"], config["up_block_types"]
    per_block = config["layers_per_block"]
    layers = [per_block] * len(down) if isinstance(per_block, int) else list(per_block)
    table = dict(_ENDS)

    def add_resnet(diffusers: str, sgm: str) -> None:
        table.update(
            {
                f"{diffusers}.{diffusers_part}": f"{sgm}.{sgm_part}"
                for diffusers_part, sgm_part in _RESNET.items()
            }
        )

    number = 1  # input_blocks.0 is conv_in
    for block, kind in enumerate(down):
        for layer in range(layers[block]):
            add_resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0")
            if "CrossAttn" in kind:
                table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < len(down) - 1:
            table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for layer in range(2):
        add_resnet(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}")
    table["mid_block.attentions.0"] = "middle_block.1"
    number = 0
    for block, kind in enumerate(up):
        for layer in range(layers[-1 - block] + 1):
            add_resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0")
            if "CrossAttn" in kind:
                table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if block < len(up) - 1:
            after = 2 if "CrossAttn" in kind else 1
            table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return dict(sorted(table.items(), key=lambda item: (-len(item[0]), item[0])))


def sgm_name(module: str, prefixes: Mapping[str, str]) -> str | None:
    """Return SGM's name of a UNet layer, or None for a layer that SGM's SDXL does not have."""
    for diffusers, sgm in prefixes.items():
        if module == diffusers or module.startswith(f"{diffusers}."):
            return sgm + module.removeprefix(diffusers)
    return None
