"""Diagnosis of NaN or infinite encoder outputs: the cause and the setting to change."""

from itertools import chain

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.runtime.stage_runner import UserError

_CHECKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def explain_latents(vae: AutoencoderKL, dtype: str, model: ResolvedModel) -> str:
    """Return why the VAE gave non-finite latents in `dtype`. Raises UserError if its weights are non-finite."""
    source = model.vae_source or model.source
    _require_finite(vae, f"VAE of {source}", "set pretrained_vae_model_name_or_path to another one")
    if dtype != "fp32":
        return f"the VAE gave NaN or infinite latents in {dtype}; set vae_dtype to fp32"
    return (
        f"the VAE of {source} gave NaN or infinite latents even in fp32, although its weights and the pixels are finite; "
        "set pretrained_vae_model_name_or_path to another VAE, or remove the image"
    )


def explain_embeds(encoders: TextEncoders, dtype: str, model: ResolvedModel, caption: str) -> str:
    """Return why the text encoders gave non-finite embeddings. Raises UserError if their weights are non-finite."""
    for name, encoder in (
        ("text encoder 1", encoders.text_encoder),
        ("text encoder 2", encoders.text_encoder_2),
    ):
        _require_finite(encoder, f"{name} of {model.source}", "set another base model")
    hint = {"fp16": "Set mixed_precision to bf16 or no.", "bf16": "Set mixed_precision to no."}.get(
        dtype, "Their weights are finite: change this caption, or set another base model."
    )
    return f"the text encoders gave NaN or infinite embeddings in {dtype} for the caption {caption[:200]!r}. {hint}"


def _require_finite(model: nn.Module, name: str, hint: str) -> None:
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not _is_finite(tensor):
            raise UserError(
                f"the {name} has NaN or infinite weights, the first in {key}: its file is broken. Download it again, or {hint}."
            )


def _is_finite(tensor: Tensor) -> bool:
    # quantized weights are tensor subclasses or dtypes without NaN or without isfinite
    return (
        tensor.dtype not in _CHECKED_DTYPES
        or type(tensor.data) is not Tensor
        or bool(tensor.isfinite().all())
    )
