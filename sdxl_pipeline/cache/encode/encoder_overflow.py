"""Why an encoder gave NaN or infinite numbers, and what to write instead."""

from itertools import chain

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.runtime.stage_runner import UserError

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def explain_latents(vae: AutoencoderKL, dtype: str, model: ResolvedModel) -> str:
    """Return why the VAE gave latents that are not finite in `dtype`. Raises UserError when its weights are not finite either."""
    source = model.vae_source or model.source
    _require_finite(vae, f"VAE of {source}", "set pretrained_vae_model_name_or_path to another one")
    if dtype != "fp32":
        return f"the VAE gave NaN or infinite latents in {dtype}; set vae_dtype to fp32"
    return (
        f"the VAE of {source} gave NaN or infinite latents even in fp32, of weights and pixels that are finite; "
        "set pretrained_vae_model_name_or_path to another VAE, or remove the image"
    )


def explain_embeds(encoders: TextEncoders, dtype: str, model: ResolvedModel, caption: str) -> str:
    """Return why the text encoders gave embeddings that are not finite. Raises UserError when their weights are not finite either."""
    for name, encoder in (
        ("text encoder 1", encoders.text_encoder),
        ("text encoder 2", encoders.text_encoder_2),
    ):
        _require_finite(encoder, f"{name} of {model.source}", "name another base model")
    hint = {"fp16": "Set mixed_precision to bf16 or no.", "bf16": "Set mixed_precision to no."}.get(
        dtype, "Their weights are finite: change this caption, or name another base model."
    )
    return f"the text encoders gave NaN or infinite embeddings in {dtype} for the caption {caption[:200]!r}. {hint}"


def _require_finite(model: nn.Module, name: str, hint: str) -> None:
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not _finite(tensor):
            raise UserError(
                f"the {name} has NaN or infinite weights, the first in {key}: its file is broken. Download it again, or {hint}."
            )


def _finite(tensor: Tensor) -> bool:
    # quantized weights are of types of their own, which have no NaN or no isfinite
    return (
        tensor.dtype not in _PLAIN_DTYPES or type(tensor.data) is not Tensor or bool(tensor.isfinite().all())
    )
