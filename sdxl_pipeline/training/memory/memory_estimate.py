"""An estimate of the device memory of a training, made before the first step and compared with the available memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import Module

from sdxl_pipeline.config.schema.optimization import OptimizationSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.schema.validation import ValidationSettings
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.memory.activations import ForwardPass, activations, saved_by_adapters
from sdxl_pipeline.training.optim.optimizers import optimizer_after_one_step, trainable_dtype
from sdxl_pipeline.training.trainable import Trainable

GIB = 1024**3
LOADED_LATER = 64 * 1024**2
"""Modules and allocator overhead that the first steps, images and plots add to the process after the estimate: 39 to 57 MiB measured on a
CPU. Not counted on a GPU."""
_PROBE_SIDE = 256  # edge of the matrix that measures an optimizer's state: large enough for quantized state


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose. Validation images are generated between steps, without gradients and activations."""

    process: int
    """Everything else in this process, now or loaded later. Not counted on a GPU, where it is about half a GiB."""
    frozen_weights: int
    trained_weights: int
    optimizer: int
    average: int
    gradients: int
    activations: int
    image: int
    """VAE and UNet while a validation image is generated."""

    @property
    def total(self) -> int:
        """Return the peak: all that is always allocated, plus the larger of a training step and a validation image."""
        always = self.process + self.frozen_weights + self.trained_weights + self.optimizer + self.average
        return always + max(self.gradients + self.activations, self.image)

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part that is not 0, by a readable name."""
        by_name = {
            "other memory of the process": self.process,
            "frozen weights": self.frozen_weights,
            "trained weights": self.trained_weights,
            "optimizer state": self.optimizer,
            "EMA weights": self.average,
            "gradients": self.gradients,
            "activations": self.activations,
            "a validation image, between steps": self.image,
        }
        return {name: size for name, size in by_name.items() if size}


def estimate_memory(
    settings: TrainingSettings,
    module: Module,
    unet: UNet2DConditionModel,
    buckets: Iterable[tuple[int, int]],
    vae_config: Path | None = None,
    num_shards: int = 1,
) -> MemoryEstimate:
    """Return the estimate for training `module`, which contains `unet`, on one device; the weights must have their final dtypes and device.

    `buckets` are the (height, width) of the images in pixels. `vae_config` is the VAE's config.json or its folder, None without validation
    images. Activations of trained text encoders are not included. `num_shards` divides everything but frozen weights, EMA and activations.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    largest = max(buckets, key=lambda size: size[0] * size[1])
    dtype = dtype_from_name(settings.mixed_precision or "no")
    full = settings.model_type == "full"
    forward_pass = ForwardPass(
        *largest,
        batch_size=settings.train_batch_size,
        dtype=dtype,
        full=full,
        checkpointing=bool(settings.gradient_checkpointing),
        interval=settings.gradient_checkpointing_interval or 1,
        norms_in_float32=_norms_in_float32(unet, dtype),
    )
    estimated = activations(unet, forward_pass, {} if full else saved_by_adapters(unet, dtype))
    activation_bytes = estimated.saved + estimated.peak
    trained_dtype = trainable_dtype(settings.optimizer, settings.mixed_precision, full)
    itemsize = trained_dtype.itemsize
    if full and itemsize > dtype.itemsize and not forward_pass.checkpointing:
        activation_bytes += dtype.itemsize * num_trained  # autocast's copies of the weights live as long
    in_fp32 = settings.gradient_precision == "fp32"
    if (settings.base_model_precision or "").endswith("-torchao"):
        # torchao's linear layers keep dequantized weights from forward to backward, unless they are recomputed
        saved_fraction = 1 - 1 / forward_pass.interval if forward_pass.checkpointing else 1
        dequantized = sum(each.numel() for each in frozen if hasattr(each, "__tensor_flatten__"))
        activation_bytes += saved_fraction * dtype.itemsize * dequantized
    on_device = settings.use_ema and settings.ema_device == "accelerator"
    return MemoryEstimate(
        process=0,
        frozen_weights=sum(map(storage_bytes, [*frozen, *module.buffers()])),
        trained_weights=num_trained * itemsize // num_shards,
        optimizer=round(num_trained * optimizer_bytes(settings, trained_dtype)) // num_shards,
        average=4 * num_trained if on_device else 0,
        gradients=num_trained * (4 if in_fp32 else itemsize) // num_shards,
        activations=round(activation_bytes),
        image=0
        if vae_config is None
        else _image_bytes(settings, unet, vae_config, dtype, dtype_from_name(settings.vae_dtype or "bf16")),
    )


def report_memory_estimate(
    spec: TrainSpec,
    trainable: Trainable,
    samples: Samples,
    device: torch.device,
    log: Callable[[str], None] | None,
) -> MemoryEstimate:
    """Return the estimate of a run on `device`, log it through `log`, and log a warning with hints if the device has less memory."""
    settings = spec.settings
    vae = spec.base_model.vae_path or spec.base_model.config_path
    config = None if settings.validation_disable else Path(vae)
    if config is not None and not (config.is_dir() and (config / "config.json").exists()):
        config = Path(spec.base_model.config_path) / "vae"
    num_shards = spec.hardware.num_processes if settings.fsdp_enable else 1
    _, buckets = samples.buckets
    estimate = estimate_memory(settings, trainable.module, trainable.unet, buckets, config, num_shards)
    if device.type != "cuda":
        weights = estimate.frozen_weights + estimate.trained_weights
        process = max(0, psutil.Process().memory_info().rss - weights)
        estimate = replace(estimate, process=process + LOADED_LATER)
    if log is None:
        return estimate
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.parts().items())
    log(f"Memory: about {format_bytes(estimate.total)} ({parts}).")
    available = device_bytes(device)
    if available < estimate.total:
        log(
            f"Warning: the device has {format_bytes(available)} of memory, and this training needs about {format_bytes(estimate.total)}. "
            f"To reduce it, set {'; '.join(hints(settings, estimate)) or 'a smaller resolution'}."
        )
    return estimate


def hints(settings: TrainingSettings, estimate: MemoryEstimate) -> list[str]:
    """Return the settings that would lower an estimate, the largest parts first."""
    full = settings.model_type == "full"
    candidates = [
        (
            estimate.activations,
            not settings.gradient_checkpointing,
            "gradient_checkpointing true",
        ),
        (
            estimate.activations,
            bool(settings.gradient_checkpointing and settings.gradient_checkpointing_interval),
            "gradient_checkpointing_interval 0",
        ),
        (
            estimate.activations,
            settings.train_batch_size > 1,
            "a smaller train_batch_size, and more gradient_accumulation_steps for it",
        ),
        (
            estimate.frozen_weights + estimate.activations // 2,
            settings.mixed_precision == "no",
            "mixed_precision bf16",
        ),
        (
            estimate.frozen_weights,
            not full and settings.base_model_precision in (None, "no_change"),
            "base_model_precision int8-quanto",
        ),
        (
            estimate.optimizer,
            full and not settings.optimizer.startswith(("ao-", "bnb-")),
            "optimizer ao-adamw8bit",
        ),
        (
            estimate.trained_weights + estimate.gradients,
            full
            and settings.mixed_precision == "bf16"
            and trainable_dtype(settings.optimizer, settings.mixed_precision, full) == torch.float32,
            "optimizer adamw_bf16",
        ),
        (estimate.average, estimate.average > 0, "ema_device cpu"),
        (estimate.image, estimate.image > estimate.activations + estimate.gradients, "vae_dtype bf16"),
    ]
    applicable = [(size, hint) for size, applies, hint in candidates if applies]
    return [hint for _, hint in sorted(applicable, key=lambda candidate: -candidate[0])]


def optimizer_bytes(settings: OptimizationSettings, dtype: torch.dtype) -> float:
    """Return the optimizer's state in bytes per trained number of `dtype`, measured with one step on a small matrix on the CPU."""
    state = optimizer_after_one_step(settings, (_PROBE_SIDE, _PROBE_SIDE), dtype).state
    tensors = [value for entries in state.values() for value in entries.values() if isinstance(value, Tensor)]
    # small tensors are shared by all parameters or independent of their size
    return sum(storage_bytes(tensor) for tensor in tensors if tensor.numel() >= _PROBE_SIDE) / _PROBE_SIDE**2


def storage_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's storage, with all parts of a quantized tensor (quanto, torchao, bitsandbytes)."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(storage_bytes(getattr(tensor, name)) for name in names)
    return tensor.untyped_storage().nbytes() + _quantization_bytes(getattr(tensor, "quant_state", None))


def device_bytes(device: torch.device) -> int:
    """Return the total memory of a device, used or free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().total)


def format_bytes(size: int) -> str:
    """Return the size in GiB, or in MiB below one GiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _image_bytes(
    settings: ValidationSettings,
    unet: UNet2DConditionModel,
    vae_config: Path,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> int:
    """Return the bytes of the VAE, plus the larger of decoding (four tensors at full resolution) and a UNet forward pass for two prompts."""
    config = AutoencoderKL.load_config(vae_config)
    with torch.device("meta"):
        vae: AutoencoderKL = AutoencoderKL.from_config(config)
    height, width = max(settings.validation_sizes, key=lambda size: size[0] * size[1])
    channels = vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)]
    decoding = 4 * height * width * channels * vae_dtype.itemsize
    sampling = ForwardPass(
        height,
        width,
        batch_size=2,
        dtype=dtype,
        full=False,
        checkpointing=True,
        norms_in_float32=_norms_in_float32(unet, dtype),
    )
    weights = sum(parameter.numel() for parameter in vae.parameters()) * vae_dtype.itemsize
    estimated = activations(unet, sampling)
    return weights + max(decoding, round(estimated.saved + estimated.peak))


def _norms_in_float32(unet: UNet2DConditionModel, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and next(unet.parameters()).device.type == "cuda"


def _quantization_bytes(state: object) -> int:
    """Return the bytes that bitsandbytes stores with a weight: its scales, their own scales, and the code table."""
    if state is None:
        return 0
    parts = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    tensors: Iterable[Tensor] = (part for part in parts if isinstance(part, Tensor))
    return sum(part.nbytes for part in tensors) + _quantization_bytes(getattr(state, "state2", None))
