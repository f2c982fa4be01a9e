"""What a trainer starts from: its accelerator and its samplers."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.data.sampling_weights import SamplingWeights, plan_sampling_weights
from sdxl_pipeline.training.distributed.sharding import ShardedUNet
from sdxl_pipeline.training.text_encoder_training import named_encoders, text_windows, trainable_text_encoders
from sdxl_pipeline.training.trainable import Trainable, TrainableLora, TrainableUNet
from sdxl_pipeline.training.trained_unet import full_unet, trainable_unet

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
    encoders = trainable_text_encoders(spec)
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
    weights = plan_sampling_weights(spec.datasets, samples, settings, num_processes)
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
