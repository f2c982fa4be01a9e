"""The encoders of a cache: their devices and precision, the check for overflow, and encoding at the time of training.

One at a time, so that a result does not depend on other requests. Models are loaded at first use. The results equal those of the encode
stages except for rounding, which depends on the batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders, load_text_encoders, load_vae
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.models.precision import PrecisionError, dtype_from_name, quantize_model
from sdxl_pipeline.runtime.stage_runner import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
from functools import cached_property
from itertools import chain
from pathlib import Path

from diffusers import AutoencoderKL
from torch import nn

from sdxl_pipeline.cache.encode.crop_batches import read_crops
from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.models.conditioning import PromptTokenizer, encode_tokens
from sdxl_pipeline.models.vae import encode_moments, pixels_from_crops


def local_device(hardware: Hardware) -> torch.device:
    """Return the device of this process and make it current: under torchrun the GPU of its local rank."""
    if hardware.device != "cuda":
        return torch.device(hardware.device)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def load_latent_encoder(model: ResolvedModel, hardware: Hardware) -> AutoencoderKL:
    """Load the VAE onto this process's device. Raises UserError when it cannot be loaded."""
    try:
        vae = load_vae(model, dtype_from_name(hardware.vae_dtype))
    except BaseModelError as error:
        raise UserError(str(error)) from error
    return vae.to(local_device(hardware), memory_format=torch.channels_last)


def load_encoders(model: ResolvedModel, hardware: Hardware) -> TextEncoders:
    """Load both text encoders onto this process's device. Raises UserError when they cannot be loaded or quantized."""
    try:
        encoders = load_text_encoders(model, dtype_from_name(hardware.text_dtype))
        quantize_model(encoders.text_encoder, hardware.text_encoder_1_precision, "text_encoder_1_precision")
        quantize_model(encoders.text_encoder_2, hardware.text_encoder_2_precision, "text_encoder_2_precision")
    except (BaseModelError, PrecisionError) as error:
        raise UserError(str(error)) from error
    return encoders.to(local_device(hardware))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU asynchronously, through page-locked memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeviceResult:
    """Tensors computed on a device and copied to the CPU, returned by `result`.

    On a CPU the computation runs in the constructor. On a GPU it is only enqueued there, so call `result` after enqueuing the next one.
    """

    def __init__(self, device: torch.device, compute: Callable[[], tuple[Tensor, ...]]) -> None:
        self._events: tuple[torch.cuda.Event, ...] = ()
        if device.type != "cuda":
            started = time.perf_counter()
            self._tensors = [tensor.cpu() for tensor in compute()]
            self._seconds = time.perf_counter() - started
            return
        self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(3))
        self._events[0].record()
        computed = compute()
        self._events[1].record()
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in computed
        ]
        self._events[2].record()

    def result(self) -> tuple[list[Tensor], float]:
        """Return the tensors on the CPU, and the seconds their computation took. Blocks until the copy is complete. Thread-safe."""
        if self._events:
            started, ended, copied = self._events
            copied.synchronize()
            self._seconds = started.elapsed_time(ended) / 1000
        return self._tensors, self._seconds


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


class LatentEncoder:
    """Encodes images to latents on the device of this process."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware) -> None:
        self._base_model = base_model
        self._hardware = hardware

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return load_latent_encoder(self._base_model, self._hardware)

    def encode(self, path: Path, crop: Crop, key: str | None = None) -> dict[str, Tensor]:
        """Return `mean` and `logvar` of one crop, (4, bucket_h / 8, bucket_w / 8) each, on the CPU in the VAE's dtype.

        `key` is the expected SHA-256 of the image file; None accepts any content. Raises UserError with the path when the image cannot be
        read or has changed, or when its latents are non-finite.
        """
        try:
            pixels = pixels_from_crops(read_crops(path, key, [crop]))
        except UnreadableImage as error:
            raise UserError(
                f"{path}: {error.reason}. Fix or remove it and materialize the dataset again."
            ) from error
        mean, logvar = (moment[0].cpu() for moment in encode_moments(self._vae, pixels))
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            reason = explain_latents(self._vae, self._hardware.vae_dtype, self._base_model)
            raise UserError(f"{path}: {reason}")
        return {"mean": mean, "logvar": logvar}


class CaptionEncoder:
    """Encodes captions and prompts to embeddings on the device of this process."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware, windows: int = 1) -> None:
        self._base_model = base_model
        self._hardware = hardware
        self._windows = windows

    @cached_property
    def _encoders(self) -> TextEncoders:
        return load_encoders(self._base_model, self._hardware)

    @cached_property
    def _reader(self) -> PromptTokenizer:
        return PromptTokenizer(self._encoders, self._windows)

    def encode(self, caption: str) -> dict[str, Tensor]:
        """Return `prompt_embeds` (77 * windows, C1 + C2) and `pooled_prompt_embeds` (C2) of one caption, on the CPU in the encoders' dtype.

        Raises UserError with the caption when they are non-finite.
        """
        input_ids = self._reader.to_windows(self._reader.read([caption]))
        prompt_embeds, pooled_prompt_embeds = (
            embeds[0].cpu() for embeds in encode_tokens(self._encoders, *input_ids)
        )
        if not (prompt_embeds.isfinite().all() and pooled_prompt_embeds.isfinite().all()):
            raise UserError(
                explain_embeds(self._encoders, self._hardware.text_dtype, self._base_model, caption)
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
