"""What a trainer starts from: its devices, and the order of its samples."""

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
"""How long a process waits for the others with its device."""


def build_accelerator(spec: TrainSpec) -> Accelerator:
    """The devices that the spec asks for. Raises UserError when they are not there, or the processes not as many."""
    hardware = spec.hardware
    accelerator = Accelerator(
        cpu=hardware.device == "cpu",
        mixed_precision=spec.settings.mixed_precision or "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if accelerator.device.type != hardware.device:
        raise UserError(
            f"the hardware profile {hardware.profile!r} asks for the device {hardware.device}, but torch has only "
            f"{accelerator.device.type} here; choose another profile, for example SDXL_HARDWARE=cpu"
        )
    if accelerator.num_processes != hardware.num_processes:
        raise UserError(
            f"the spec asks for {hardware.num_processes} processes, but {accelerator.num_processes} are running; "
            "start it with torchrun --nproc-per-node of that number"
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
class PlannedOrder:
    """The samples of a run in their order, and how often an epoch shows them."""

    passes: SamplingWeights
    order: BucketBatchSampler
    read_ahead: BucketBatchSampler
    """The same order again, for the thread that reads ahead: an order remembers the epoch it planned last."""

    @property
    def images_per_epoch(self) -> dict[str, float]:
        """Appearances of images in an epoch, by dataset."""
        counts = self.order.samples.images_by_dataset()
        return {name: count * self.passes.by_dataset[name] for name, count in counts.items()}


def plan_order(spec: TrainSpec, num_processes: int, reporter: Reporter) -> PlannedOrder:
    """The order of the spec's training images; repeats that are raised and batches that are not full are logged."""
    settings = spec.settings
    samples = load_samples(spec.datasets, "train", settings.micro_conditioning)
    passes = plan_sampling_weights(spec.datasets, samples, settings, num_processes)
    order = partial(
        BucketBatchSampler,
        samples,
        passes.by_dataset,
        settings.seed,
        settings.train_batch_size,
        num_processes,
        settings.bucket_fill,
    )
    planned = PlannedOrder(passes, order(), order())
    for dataset_id, repeats in passes.raised_repeats.items():
        reporter.log(
            f"The datasets do not fill a step: repeats of {dataset_id} is raised to {repeats} (allow_dataset_oversubscription)."
        )
    full = planned.order.global_batch_size
    for (height, width), (have, missing) in planned.order.unfilled().items():
        outcome = (
            f"its last batch has {full - missing} instead of {full} (bucket_fill: partial)"
            if settings.bucket_fill == "partial"
            else f"{missing} of them are repeated to fill its last batch (bucket_fill: wrap)"
        )
        reporter.log(f"Bucket {width}x{height} has {have} images an epoch: {outcome}.")
    return planned
