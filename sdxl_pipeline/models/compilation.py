"""torch.compile for the UNet, in place: names of modules and parameters stay what they are, and so do checkpoints and adapters."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

RECOMPILE_LIMIT = 64
"""Compiled forms of one piece of code: by width of layer, training or drawing, adapter on or off, and kind of bucket.

Torch's own limit is 8, beyond which it goes on uncompiled.
"""


def compile_unet(
    unet: UNet2DConditionModel,
    backend: str,
    *,
    regional: bool,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> None:
    """Have torch compile the UNet when it is first called; `backend` "no" leaves it as it is.

    `regional` compiles the transformer blocks alone, the part that SDXL has 70 of: the first step comes after a fraction of the time, and
    what lies between the blocks runs as before. `mode`, `fullgraph` and `dynamic` are torch.compile's own.
    """
    if backend == "no":
        return
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    options: dict[str, Any] = {"backend": backend, "fullgraph": fullgraph, "dynamic": dynamic}
    if backend == "inductor":
        options["mode"] = mode
    if regional:
        unet.compile_repeated_blocks(**options)
    else:
        unet.compile(**options)
