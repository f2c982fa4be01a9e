"""Loading the encoders onto this process's device, and asynchronous copies to and from it."""

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
