"""What a training takes of its device's memory: estimated before the first step, so that it can be compared with what there is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import Module

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.memory.activations import ForwardPass, activations
from sdxl_pipeline.training.memory.adapter_activations import saved_by_adapters
from sdxl_pipeline.training.optim.optimizers import after_a_step, trainable_dtype
from sdxl_pipeline.training.trainable import Trainable

GIB = 1024**3
LOADED_LATER = 64 * 1024**2
"""What the first steps, images and plots load into a process that the estimate is made in, and what allocators keep beside it: 39 to 57
MiB were measured on a CPU. A GPU's memory holds none of it."""
_PROBE_SIDE = 256  # of the matrix that an optimizer is asked with: large enough for state in few bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for. Images are drawn between steps, when neither gradients nor activations are there."""

    process: int
    """Of everything else that this process holds or will load; on a GPU that is not counted, and about half a GiB."""
    frozen_weights: int
    trained_weights: int
    optimizer: int
    average: int
    gradients: int
    activations: int
    image: int
    """VAE and UNet while a validation image is drawn."""

    @property
    def total(self) -> int:
        """At its largest: of what lies there by turns, the larger."""
        lasting = self.process + self.frozen_weights + self.trained_weights + self.optimizer + self.average
        return lasting + max(self.gradients + self.activations, self.image)

    def parts(self) -> dict[str, int]:
        """In words, those that are there."""
        named = {
            "this process beside the model": self.process,
            "frozen weights": self.frozen_weights,
            "trained weights": self.trained_weights,
            "optimizer state": self.optimizer,
            "average of the weights": self.average,
            "gradients": self.gradients,
            "activations": self.activations,
            "a validation image, between steps": self.image,
        }
        return {name: size for name, size in named.items() if size}


def estimate_memory(
    settings: TrainingSettings,
    module: Module,
    unet: UNet2DConditionModel,
    buckets: Iterable[tuple[int, int]],
    vae_config: Path | None = None,
    processes_sharing: int = 1,
) -> MemoryEstimate:
    """What training `module`, of which `unet` is a part, takes on one device, its weights being where and what they are.

    `buckets` are the (height, width) of the images, in pixels, `vae_config` the VAE's config.json or its folder if images are
    drawn. Of text encoders that are trained the activations are left out. `processes_sharing` divide everything but the activations.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    largest = max(buckets, key=lambda size: size[0] * size[1])
    dtype = dtype_from_name(settings.mixed_precision or "no")
    full = settings.model_type == "full"
    asked = ForwardPass(
        *largest,
        batch_size=settings.train_batch_size,
        dtype=dtype,
        full=full,
        checkpointing=bool(settings.gradient_checkpointing),
        interval=settings.gradient_checkpointing_interval or 1,
        wide_norms=_has_wide_norms(unet, dtype),
    )
    needed = activations(unet, asked, {} if full else saved_by_adapters(unet, dtype))
    active = needed.kept + needed.passing
    held = trainable_dtype(settings).itemsize
    if full and held > dtype.itemsize and not asked.checkpointing:
        active += dtype.itemsize * numbers  # autocast's copies of the weights live as long
    in_fp32 = settings.gradient_precision == "fp32"
    if (settings.base_model_precision or "").endswith("-torchao"):
        # its linear layers keep their weights unpacked from the forward pass to the backward one, unless they are recomputed
        kept = 1 - 1 / asked.interval if asked.checkpointing else 1
        unpacked = sum(each.numel() for each in frozen if hasattr(each, "__tensor_flatten__"))
        active += kept * dtype.itemsize * unpacked
    on_device = settings.use_ema and settings.ema_device == "accelerator"
    return MemoryEstimate(
        process=0,
        frozen_weights=sum(map(held_bytes, [*frozen, *module.buffers()])),
        trained_weights=numbers * held // processes_sharing,
        optimizer=round(numbers * optimizer_bytes(settings)) // processes_sharing,
        average=4 * numbers if on_device else 0,
        gradients=numbers * (4 if in_fp32 else held) // processes_sharing,
        activations=round(active),
        image=0 if vae_config is None else _image_bytes(settings, unet, vae_config),
    )


def announce_estimate(
    spec: TrainSpec,
    trainable: Trainable,
    samples: Samples,
    device: torch.device,
    log: Callable[[str], None] | None,
) -> MemoryEstimate:
    """Estimate what the run will take on `device`, say so through `log`, and warn of a device that has less."""
    settings = spec.settings
    vae = spec.base_model.vae_path or spec.base_model.config_path
    config = None if settings.validation_disable else Path(vae)
    if config is not None and not (config.is_dir() and (config / "config.json").exists()):
        config = Path(spec.base_model.config_path) / "vae"
    sharing = spec.hardware.num_processes if settings.fsdp_enable else 1
    _, buckets = samples.buckets
    estimate = estimate_memory(settings, trainable.module, trainable.unet, buckets, config, sharing)
    if device.type != "cuda":
        weights = estimate.frozen_weights + estimate.trained_weights
        process = max(0, psutil.Process().memory_info().rss - weights)
        estimate = replace(estimate, process=process + LOADED_LATER)
    if log is None:
        return estimate
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.parts().items())
    log(f"Memory: about {format_bytes(estimate.total)} ({parts}).")
    there = device_bytes(device)
    if there < estimate.total:
        log(
            f"Warning: the device has {format_bytes(there)} of memory, and this training takes about {format_bytes(estimate.total)}. "
            f"It would take less with {'; '.join(hints(settings, estimate)) or 'a smaller resolution'}."
        )
    return estimate


def hints(settings: TrainingSettings, estimate: MemoryEstimate) -> list[str]:
    """The settings that would lower an estimate, the largest parts first."""
    large = settings.model_type == "full"
    offers = [
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
            not large and settings.base_model_precision in (None, "no_change"),
            "base_model_precision int8-quanto",
        ),
        (
            estimate.optimizer,
            large and not settings.optimizer.startswith(("ao-", "bnb-")),
            "optimizer ao-adamw8bit",
        ),
        (
            estimate.trained_weights + estimate.gradients,
            large and settings.mixed_precision == "bf16" and trainable_dtype(settings) == torch.float32,
            "optimizer adamw_bf16",
        ),
        (estimate.average, estimate.average > 0, "ema_device cpu"),
        (estimate.image, estimate.image > estimate.activations + estimate.gradients, "vae_dtype bf16"),
    ]
    return [words for _, _, words in sorted((o for o in offers if o[1]), key=lambda o: -o[0])]


def optimizer_bytes(settings: TrainingSettings) -> float:
    """What the optimizer keeps for each number it trains: asked of itself, with a step on a small matrix on the CPU."""
    state = after_a_step(settings, (_PROBE_SIDE, _PROBE_SIDE)).state
    kept = [value for entries in state.values() for value in entries.values() if isinstance(value, Tensor)]
    # tables that all parameters share, or that are small whatever the parameter, are not for each number
    return sum(held_bytes(tensor) for tensor in kept if tensor.numel() >= _PROBE_SIDE) / _PROBE_SIDE**2


def held_bytes(tensor: Tensor) -> int:
    """What a tensor takes, the parts of those that are made of others included (quanto's, torchao's and bitsandbytes')."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(held_bytes(getattr(tensor, name)) for name in names)
    return tensor.untyped_storage().nbytes() + _quantization_bytes(getattr(tensor, "quant_state", None))


def device_bytes(device: torch.device) -> int:
    """All the memory a device has, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().total)


def format_bytes(size: int) -> str:
    """In GiB, or in MiB below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _image_bytes(settings: TrainingSettings, unet: UNet2DConditionModel, vae_config: Path) -> int:
    """The VAE, and the larger of two: its last layers over all pixels, four tensors of them; the UNet without gradients, for two prompts."""
    config = AutoencoderKL.load_config(vae_config)
    with torch.device("meta"):
        vae: AutoencoderKL = AutoencoderKL.from_config(config)
    itemsize = dtype_from_name(settings.vae_dtype or "bf16").itemsize
    height, width = max(settings.validation_sizes, key=lambda size: size[0] * size[1])
    channels = vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)]
    decoding = 4 * height * width * channels * itemsize
    dtype = dtype_from_name(settings.mixed_precision or "no")
    drawing = ForwardPass(
        height,
        width,
        batch_size=2,
        dtype=dtype,
        full=False,
        checkpointing=True,
        wide_norms=_has_wide_norms(unet, dtype),
    )
    weights = sum(parameter.numel() for parameter in vae.parameters()) * itemsize
    needed = activations(unet, drawing)
    return weights + max(decoding, round(needed.kept + needed.passing))


def _has_wide_norms(unet: UNet2DConditionModel, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and next(unet.parameters()).device.type == "cuda"


def _quantization_bytes(state: object) -> int:
    """Of what bitsandbytes keeps beside a weight: its scales, theirs, and the table of its values."""
    if state is None:
        return 0
    parts = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    tensors: Iterable[Tensor] = (part for part in parts if isinstance(part, Tensor))
    return sum(part.nbytes for part in tensors) + _quantization_bytes(getattr(state, "state2", None))
