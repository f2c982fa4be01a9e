"""What a trainer starts from, built from the spec of the run. The parts themselves take values or their own section of the settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import UNET, AdapterError, add_adapter
from sdxl_pipeline.models.adapters.init_adapter import has_text_encoder_weights, load_init_adapter
from sdxl_pipeline.models.components import latent_scaling_factor, load_unet
from sdxl_pipeline.models.precision import PrecisionError, dtype_from_name, quantize_model
from sdxl_pipeline.models.unet_execution import (
    AttentionKernelError,
    compile_unet,
    enable_checkpointing,
    use_attention_kernel,
)
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.training.data.batches import BatchReader, TrainingBatches
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.loss_masks import build_loss_weights
from sdxl_pipeline.training.data.samples import Sample, load_samples
from sdxl_pipeline.training.data.training_plan import SamplingWeights, plan_sampling_weights
from sdxl_pipeline.training.diffusion.forward_process import build_forward_process
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.distributed.sharding import ShardedUNet
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.optim.optimizers import trainable_dtype
from sdxl_pipeline.training.rng import derive_seed
from sdxl_pipeline.training.text_encoder_training import named_encoders, text_windows, trainable_text_encoders
from sdxl_pipeline.training.trainable import Trainable, TrainableLora, TrainableUNet
from sdxl_pipeline.training.validation.eval_loss import EvalImage, eval_timesteps, load_eval_images
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples, select_probe_samples
from sdxl_pipeline.training.validation.previews import Previews
from sdxl_pipeline.training.validation.validation_images import ImageGenerator
from sdxl_pipeline.training.validation.validation_runner import (
    TrainingEvalLoss,
    ValidationSchedule,
    Validator,
)


def base_dtype(spec: TrainSpec) -> torch.dtype:
    """Return the dtype of the frozen weights: the autocast dtype, because more precision would have no effect."""
    return dtype_from_name(spec.settings.mixed_precision or "no")


def trained_dtype(settings: TrainingSettings) -> torch.dtype:
    """Return the dtype of the trained parameters."""
    return trainable_dtype(settings.optimizer, settings.mixed_precision, full=settings.model_type == "full")


def trainable_unet(
    spec: TrainSpec, encoders: Mapping[str, nn.Module] = MappingProxyType({})
) -> UNet2DConditionModel:
    """Return the base model's UNet on the CPU with a new adapter in float32; only the adapter requires gradients.

    `encoders` are text encoders with new adapters, by prefix; they are initialized from `init_lora` like the UNet if that file has weights
    for them. Raise UserError for target modules that do not exist, and for a precision whose package is missing.
    """
    settings = spec.settings
    unet: UNet2DConditionModel = load_unet(spec.base_model, base_dtype(spec))
    try:
        quantize_model(unet, settings.base_model_precision or "no_change")
        if (
            settings.lora_type == "lycoris"
            and settings.lycoris.module_dropout
            and spec.hardware.num_processes > 1
        ):
            raise AdapterError(
                "lycoris_config: module_dropout skips different layers on each process, so that gradient synchronization would deadlock. "
                "Set it to 0, or train on one device."
            )
        add_adapter(unet, settings, derive_seed(settings.seed, "adapter"))
        if settings.init_lora is not None:
            has_encoders = has_text_encoder_weights(Path(settings.init_lora))
            load_init_adapter({UNET: unet, **(encoders if has_encoders else {})}, Path(settings.init_lora))
    except (AdapterError, PrecisionError) as error:
        raise UserError(f"config.json: {error}") from error
    _configure_compute(unet, spec)
    return unet


def full_unet(spec: TrainSpec) -> UNet2DConditionModel:
    """Return the base model's UNet on the CPU in `trained_dtype`; all weights require gradients, or only the biases (bitfit)."""
    settings = spec.settings
    unet: UNet2DConditionModel = load_unet(spec.base_model, trained_dtype(settings))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(settings.layer_freeze_strategy is None or name.endswith(".bias"))
    _configure_compute(unet, spec)
    return unet


def _configure_compute(unet: UNet2DConditionModel, spec: TrainSpec) -> None:
    """Set the attention kernel, gradient checkpointing and compilation. Raise UserError for an unavailable kernel."""
    settings = spec.settings
    try:
        use_attention_kernel(
            unet, settings.attention_mechanism or "diffusers", torch.device(spec.hardware.device)
        )
    except AttentionKernelError as error:
        raise UserError(f"config.json: attention_mechanism: {error}") from error
    if settings.gradient_checkpointing:
        enable_checkpointing(unet, settings.gradient_checkpointing_interval)
    regional = settings.dynamo_use_regional_compilation
    if settings.dynamo_backend == "inductor" and not regional and spec.hardware.device == "cpu":
        # With torch 2.13 most gradients of a UNet compiled as a whole are wrong on a CPU, by up to 60 %; those of its blocks are right.
        raise UserError(
            "config.json: dynamo_use_regional_compilation: false: inductor computes wrong gradients for a UNet that is compiled as a "
            'whole on a CPU. Remove it, or write "dynamo_backend": "no"'
        )
    compile_unet(
        unet,
        settings.dynamo_backend,
        regional=regional,
        mode=settings.dynamo_mode,
        fullgraph=settings.dynamo_fullgraph,
        dynamic=settings.dynamo_dynamic,
    )


COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Timeout of collective operations on the device."""


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """Return the accelerator of the spec's hardware profile. Raise UserError if the device is missing or the number of processes differs."""
    hardware = spec.hardware
    accelerator = Accelerator(
        cpu=hardware.device == "cpu",
        mixed_precision=spec.settings.mixed_precision or "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if accelerator.device.type != hardware.device:
        raise UserError(
            f"the hardware profile {hardware.profile!r} needs the device {hardware.device}, but torch finds only "
            f"{accelerator.device.type} here; choose another profile, for example SDXL_HARDWARE=cpu"
        )
    if accelerator.num_processes != hardware.num_processes:
        raise UserError(
            f"the spec needs {hardware.num_processes} processes, but {accelerator.num_processes} are running; "
            f"start it with torchrun --nproc-per-node {hardware.num_processes}"
        )
    return accelerator


def build_trainable(spec: TrainSpec) -> Trainable:
    """Return what the settings train, on the CPU. Raises UserError for settings that the model or this machine does not support."""
    settings = spec.settings
    if settings.model_type == "full" and settings.fsdp_enable:
        return ShardedUNet(full_unet(spec), settings.fsdp_reshard_after_forward)
    if settings.model_type == "full":
        return TrainableUNet(full_unet(spec))
    if not settings.train_text_encoder:
        return TrainableLora(trainable_unet(spec))
    encoders = trainable_text_encoders(
        spec.base_model,
        base_dtype(spec),
        settings,
        settings.seed,
        checkpointing=bool(settings.gradient_checkpointing),
    )
    unet = trainable_unet(spec, named_encoders(encoders))
    return TrainableLora(unet, encoders, text_windows(spec.datasets))


@dataclass(frozen=True)
class TrainingSamplers:
    """The samplers of a run, and the sampling weights they use."""

    sampling_weights: SamplingWeights
    sampler: BucketBatchSampler
    prefetch: BucketBatchSampler
    """The same order for the prefetching thread: a sampler caches its last epoch and is not thread-safe."""

    @property
    def images_per_epoch(self) -> dict[str, float]:
        """Return how many images of each dataset an epoch contains, repeats included."""
        counts = self.sampler.samples.images_by_dataset()
        return {name: count * self.sampling_weights.by_dataset[name] for name, count in counts.items()}


def build_samplers(spec: TrainSpec, num_processes: int, reporter: Reporter) -> TrainingSamplers:
    """Build the samplers of the spec's training images; log raised repeats and partial batches."""
    settings = spec.settings
    samples = load_samples(spec.datasets, "train", settings.micro_conditioning)
    weights = plan_sampling_weights(
        spec.datasets, samples, settings, num_processes, settings.allow_dataset_oversubscription
    )
    build = partial(
        BucketBatchSampler,
        samples,
        weights.by_dataset,
        settings.seed,
        settings.train_batch_size,
        num_processes,
        settings.bucket_fill,
    )
    samplers = TrainingSamplers(weights, build(), build())
    for dataset_id, repeats in weights.raised_repeats.items():
        reporter.log(
            f"The datasets do not fill a step: repeats of {dataset_id} is raised to {repeats} (allow_dataset_oversubscription)."
        )
    full = samplers.sampler.global_batch_size
    for (height, width), (have, missing) in samplers.sampler.partial_buckets().items():
        outcome = (
            f"its last batch has {full - missing} instead of {full} (bucket_fill: partial)"
            if settings.bucket_fill == "partial"
            else f"{missing} of them are repeated to fill its last batch (bucket_fill: wrap)"
        )
        reporter.log(f"Bucket {width}x{height} has {have} images an epoch: {outcome}.")
    return samplers


def build_batches(
    spec: TrainSpec,
    reader: BatchReader,
    sampler: BucketBatchSampler,
    rank: int,
    num_train_timesteps: int,
) -> TrainingBatches:
    """Return the batches of the process `rank`, in the order of `sampler`."""
    settings = spec.settings
    return TrainingBatches(
        sampler,
        reader,
        scaling_factor=latent_scaling_factor(spec.base_model),
        forward_process=build_forward_process(
            settings, settings, num_train_timesteps, settings.gradient_accumulation_steps
        ),
        caption_dropout_probability=settings.caption_dropout_probability,
        rank=rank,
        loss_weights=build_loss_weights(
            spec.datasets, settings, use_base_prediction=settings.model_type != "full"
        ),
    )


def build_validation_schedule(
    spec: TrainSpec, sampler: BucketBatchSampler, total_steps: int
) -> ValidationSchedule:
    """Return the steps at which a run of the spec validates."""
    settings = spec.settings
    return ValidationSchedule(
        images=settings,
        losses=settings,
        has_prompts=bool(spec.prompts),
        total_steps=total_steps,
        epochs_at=lambda step: sampler.epochs_after(step * settings.gradient_accumulation_steps),
    )


def image_generator(
    spec: TrainSpec, reader: BatchReader, folder: Path, previews: Previews | None = None
) -> ImageGenerator:
    """Return the generator of the spec's validation images."""
    settings = spec.settings
    return ImageGenerator(
        base_model=spec.base_model,
        vae_dtype=_vae_dtype(spec),
        prompts=spec.prompts,
        settings=settings,
        seed=settings.effective_validation_seed,
        scheduler_changes=settings.scheduler_changes,
        reader=reader,
        folder=folder,
        previews=previews,
    )


def build_validator(
    spec: TrainSpec,
    *,
    schedule: ValidationSchedule,
    reader: BatchReader,
    scheduler: DDPMScheduler,
    device: torch.device,
    resumed_at: int,
    observer: RunObserver,
    reporter: Reporter,
    stop: StopSignal,
) -> Validator:
    """Return the validator of a run, with all that it needs loaded.

    Raises UserError for a tiny autoencoder that cannot be loaded, and when the eval loss is enabled but there is no image for it.
    """
    run_dir, settings = Path(spec.run_dir), spec.settings
    previews = None
    if settings.validation_preview and schedule.images_are_due(schedule.total_steps):
        previews = Previews(
            settings, spec.base_model, _vae_dtype(spec), device, run_dir / "previews", observer.on_preview
        )
    return Validator(
        run_dir,
        schedule,
        images=image_generator(spec, reader, run_dir / "validation", previews),
        eval_loss=_training_eval_loss(spec, reader, scheduler, reporter)
        if settings.eval_loss_in_training
        else None,
        resumed_at=resumed_at,
        observer=observer,
        stop=stop,
    )


def _training_eval_loss(
    spec: TrainSpec, reader: BatchReader, scheduler: DDPMScheduler, reporter: Reporter
) -> TrainingEvalLoss:
    settings = spec.settings
    source, samples = select_eval_samples(spec.datasets, settings, settings.micro_conditioning)
    if not samples:
        raise UserError(
            "there is no image to compute the eval loss on: the datasets' aspect_buckets have no rows"
        )
    reporter.log(f"The eval loss is computed on {len(samples)} images ({source}).")
    has_probe = source != "training images"  # otherwise it would have the same images
    probe = select_probe_samples(spec.datasets, settings) if has_probe else []

    def read(samples: Iterable[Sample]) -> Callable[[], list[EvalImage]]:
        read_images = partial(load_eval_images, samples, reader, latent_scaling_factor(spec.base_model))
        images = None if reader.online_text_encoder else read_images()
        return read_images if images is None else lambda: images

    return TrainingEvalLoss(
        Objective.plain(scheduler),
        eval_timesteps(settings.eval_timesteps, scheduler.config.num_train_timesteps),
        settings.train_batch_size,
        read_images=read(samples),
        read_probe=read(probe),
    )


def _vae_dtype(spec: TrainSpec) -> torch.dtype:
    return dtype_from_name(spec.settings.vae_dtype or spec.hardware.vae_dtype)
