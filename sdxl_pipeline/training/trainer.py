"""The training loop, and what it needs to start, save and go on. The loss of a batch is in batch_loss.py, the setup in trainer_setup.py."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.models.components import latent_scaling_factor, load_noise_scheduler
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import (
    CheckpointKind,
    checkpoint_due,
    checkpoint_limit,
)
from sdxl_pipeline.training.checkpoint.checkpoint_uploads import CheckpointUploads
from sdxl_pipeline.training.checkpoint.checkpoints import (
    CHECKPOINTS,
    TrainingState,
    clear_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    require_same_parameters,
    save_checkpoint,
)
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor
from sdxl_pipeline.training.checkpoint.run_lineage import read_lineage
from sdxl_pipeline.training.checkpoint.warm_start import rebase_state
from sdxl_pipeline.training.data.batches import Batch, BatchReader, TrainingBatches, prefetched
from sdxl_pipeline.training.data.bucket_sampler import total_planned_steps
from sdxl_pipeline.training.data.loss_masks import build_loss_weights
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.diffusion.batch_loss import BatchLoss
from sdxl_pipeline.training.diffusion.forward_process import build_forward_process
from sdxl_pipeline.training.distributed.cpu_group import CpuGroup
from sdxl_pipeline.training.distributed.sharding import shard_like, to_full_tensor
from sdxl_pipeline.training.logging.metrics_log import METRICS_FILE, MetricsLog
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.step_log import StepLog, StepRecord
from sdxl_pipeline.training.memory.memory_estimate import announce_estimate
from sdxl_pipeline.training.optim.eval_weights import EvalWeights
from sdxl_pipeline.training.optim.lr_schedules import build_schedule
from sdxl_pipeline.training.optim.non_finite import propagate_nonfinite, step_if_finite
from sdxl_pipeline.training.optim.optimizers import build_optimizer, cast_parameters, current_lr
from sdxl_pipeline.training.rng import derive_seed
from sdxl_pipeline.training.trained_unet import base_dtype
from sdxl_pipeline.training.trainer_setup import build_accelerator, build_trainable, plan_order
from sdxl_pipeline.training.validation.validation_runner import ValidationSchedule, Validator

REPORT_INTERVAL = 10
"""Optimizer steps between two looks at the losses, the only moments when the loop waits for the device."""


class Trainer:
    """One run of one identity: setup here, then `train`, then `write_weights`.

    The state that training changes is the trained parameters and their average, the optimizer, the schedule, the loss scaler and the
    step; `state` and `restore` are the only ways out and in. Hold the run's lock (`run_lock`) on the main process meanwhile, and enter
    its `watch`, without which the run takes no looks.
    """

    def __init__(
        self,
        spec: TrainSpec,
        identity: str,
        reporter: Reporter,
        stop: StopSignal,
        watch: RunObserver | None = None,
    ) -> None:
        self.spec, self.identity, self.reporter, self.stop = spec, identity, reporter, stop
        self.watch = watch
        settings = spec.settings
        self.run_dir = Path(spec.run_dir)
        self.disk = FreeDiskMonitor(self.run_dir, settings)
        self.started = time.monotonic()
        self.accumulation = settings.gradient_accumulation_steps
        self.accelerator = build_accelerator(spec)
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self.cpu_group = CpuGroup(self.accelerator.num_processes)

        planned = plan_order(spec, self.accelerator.num_processes, reporter)
        self.order, self.passes = planned.order, planned.passes
        self.images_per_epoch = planned.images_per_epoch
        self.total_steps = total_planned_steps(settings, self.order)

        scheduler = load_noise_scheduler(spec.base_model, settings.scheduler_changes)
        self.trainable = build_trainable(spec).to(self.device)
        self.batch_loss = BatchLoss(settings, scheduler, self.trainable, base_dtype(spec), self.device)
        encoders = OnDemandEncoders(spec.base_model, spec.hardware)
        self.reader = BatchReader(spec.datasets, encoders, self.trainable.online_text_encoder)
        self.batches = TrainingBatches(
            order=planned.read_ahead,
            reader=self.reader,
            scaling_factor=latent_scaling_factor(spec.base_model),
            forward_process=build_forward_process(settings, scheduler.config.num_train_timesteps),
            caption_dropout_probability=settings.caption_dropout_probability,
            rank=self.accelerator.process_index,
            loss_weights=build_loss_weights(spec),
        )

        self.parameters = self.trainable.parameters
        cast_parameters(settings, self.parameters.values())
        self.optimizer = self.accelerator.prepare(
            build_optimizer(
                settings,
                self.trainable.unet_parameters,
                self.accelerator.num_processes,
                self.trainable.text_parameters,
            )
        )
        self.schedule = build_schedule(settings, self.optimizer.optimizer, self.total_steps)
        self.unet = self.trainable.prepared(self.accelerator)
        self.shown = EvalWeights(settings, self.optimizer.optimizer, self.parameters, self.device)
        self.memory = announce_estimate(
            spec, self.trainable, self.order.samples, self.device, reporter.log if self.is_main else None
        )

        pushes = settings.push_to_hub and settings.push_checkpoints_to_hub and self.is_main
        self.uploads = CheckpointUploads(settings, self.run_dir, reporter.log) if pushes else None

        self.step = 0
        self._seconds_before = self._training_seconds_before = 0.0  # spent by earlier sessions
        self.resumed_from: int | None = None
        self._resume()

        self.validation_schedule = ValidationSchedule(spec, self.total_steps, self.epochs_at)
        objective = self.batch_loss.objective
        self.validator = (
            Validator(
                self.validation_schedule,
                self.reader,
                objective,
                self.device,
                self.step,
                self.watch,
                reporter,
                stop,
            )
            if self.watch is not None
            else None
        )
        self.log = StepLog(
            self.accelerator,
            reporter,
            order=self.order,
            total_steps=self.total_steps,
            training_seconds=self._training_seconds_before,
            metrics=MetricsLog(self.run_dir / METRICS_FILE, self.step) if self.is_main else None,
            watch=self.watch,
            validator=self.validator,
        )

    def train(self) -> None:
        """Train from where the run stands to its end. Raises StageStopped, after a checkpoint, when asked to stop."""
        self.unet.train()
        if self.watch is not None:
            self.watch.begin(self.step, self.total_steps)
        self.reporter.progress("train", self.step, self.total_steps, "steps")
        self._validate_if_due()
        self._stop_if_asked()
        first, last = self.step * self.accumulation, self.total_steps * self.accumulation
        self.log.restart_clock()
        with closing(prefetched(self.batches, first, last, pin=self.device.type == "cuda")) as batches:
            while self.step < self.total_steps:
                self._optimizer_step(batches)
                self.reporter.progress("train", self.step, self.total_steps, "steps")
                if self.step % REPORT_INTERVAL == 0:
                    self.log.report()
                due = checkpoint_due(self.spec.settings, self.step, self.total_steps, self.epochs_at)
                if due is not None:
                    self._save(due)
                self._validate_if_due()
                self._stop_if_asked()

    def _optimizer_step(self, batches: Iterator[Batch]) -> None:
        losses, images = [], 0
        for part in range(self.accumulation):
            is_last = part == self.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                batch = next(batches)
                loss = self._loss(batch, self.step * self.accumulation + part) * batch.share
                self.accelerator.backward(propagate_nonfinite(loss))
            losses.append(loss.detach())
            images += batch.images
        self.accelerator.unscale_gradients()
        grad_norm = to_full_tensor(self._clip_gradients())
        lr = float(self.schedule.get_last_lr()[0])
        step_if_finite(self.optimizer, grad_norm)
        self.schedule.step()
        self.optimizer.optimizer.zero_grad()  # accelerate's own asks at each step what arguments this one takes
        self.step += 1
        self.shown.update(self.step)
        rate, scalars = current_lr(self.optimizer, lr), self.shown.scalars(self.step)
        self.log.add(StepRecord(self.step, torch.stack(losses), grad_norm, rate, images, scalars))

    def _clip_gradients(self) -> Tensor:
        """The norm that all gradients together had, ()."""
        settings, parameters = self.spec.settings, list(self.parameters.values())
        bound = settings.max_grad_norm or math.inf
        if settings.grad_clip_method == "norm":
            return torch.nn.utils.clip_grad_norm_(parameters, bound)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grad_value_(parameters, bound)
        return norm

    def _loss(self, batch: Batch, index: int) -> Tensor:
        """Mean loss of one batch, the `index`-th of this process since the start of the run."""
        # The adapter's dropout is the one random choice that torch's global state makes.
        _seed(
            self.device,
            derive_seed(self.spec.settings.seed, "dropout", index, self.accelerator.process_index),
        )
        return self.batch_loss(self.unet, batch.to(self.device))

    def state(self) -> TrainingState:
        """Everything training has changed, as of now; to be asked of all processes together while what they train is `summon_full_params`."""
        scaler = self.accelerator.scaler
        return TrainingState(
            step=self.step,
            seconds=self.seconds,
            training_seconds=self.log.training_seconds,
            parameters=self.trainable.full_state_dict(),
            optimizer=self.trainable.full_optimizer_state_dict(self.optimizer.state_dict()),
            schedule=self.schedule.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            average=self.shown.state(),
        )

    def restore(self, state: TrainingState) -> None:
        """Be as `state` was."""
        require_same_parameters(state, self.parameters)
        if not state.same_trajectory:
            state = rebase_state(state, self.spec.settings, self.optimizer.optimizer, self.schedule)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(shard_like(state.parameters[name], parameter))
        self.optimizer.load_state_dict(self.trainable.shard_optimizer_state_dict(state.optimizer))
        self.schedule.load_state_dict(state.schedule)
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.shown.restore(state.average)
        self.step = state.step
        self._seconds_before, self._training_seconds_before = state.seconds, state.training_seconds

    @property
    def seconds(self) -> float:
        """Spent on the run by all its sessions, up to their last checkpoints."""
        return self._seconds_before + time.monotonic() - self.started

    @property
    def samples(self) -> int:
        """Images seen, each as often as it appeared."""
        return self.order.images_until(self.step * self.accumulation)

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return self.epochs_at(self.step)

    def epochs_at(self, step: int) -> float:
        """Passes over the training images after a step."""
        epoch, place = self.order.locate(step * self.accumulation)
        return epoch + place / self.order.batches_in(epoch)

    @property
    def unet_module(self) -> UNet2DConditionModel:
        """The UNet itself, without what data parallelism wraps around it."""
        return self.trainable.unet

    @property
    def written_bytes(self) -> int:
        """What `write_weights` takes on the disk, but for a few kilobytes; on the main process, while what is trained is `summon_full_params`."""
        return self.trainable.written_bytes * (1 if self.shown.ema is None else 2)

    def write_weights(self, folder: Path) -> Path:
        """Write what was trained into `folder`, as users load it, and give its place; the same run gives the same bytes."""
        # what the base model is, not where it lies: the file may be published
        metadata = {
            "base_model_sha256": self.spec.base_model.digest,
            "identity": self.identity,
            "step": str(self.step),
        }
        write = partial(self.trainable.write, metadata=metadata)
        return self.shown.write(folder, write, self.trainable.weights_name)

    def close(self) -> None:
        """Close the data and leave the process group."""
        self.reader.close()
        self.accelerator.end_training()

    def _resume(self) -> None:
        root = self.run_dir / CHECKPOINTS
        resumes = self.spec.settings.resume_from_checkpoint is not None
        if self.is_main:
            clear_checkpoints(root, unfinished_only=resumes)
        self.accelerator.wait_for_everyone()
        place = latest_checkpoint(root, self.identity, self.reporter.log)
        if place is not None:
            self.restore(load_checkpoint(place))
            self.resumed_from = self.step
            self.reporter.log(f"Resuming from {place}, step {self.step} of {self.total_steps}.")

    def _save(self, kind: CheckpointKind = "step") -> None:
        self.log.report()
        self.reader.flush()
        with self.trainable.summon_full_params(torch.device("cpu")):
            state = self.state()
            if self.is_main:
                place = save_checkpoint(
                    self.run_dir / CHECKPOINTS,
                    self.identity,
                    state,
                    export=self.write_weights,
                    exports_parameters=self.trainable.export_is_exact and self.shown.are_trained,
                    export_bytes=self.written_bytes,
                    limit=checkpoint_limit(self.spec.settings, kind),
                    kind=kind,
                    lineage=read_lineage(self.run_dir),
                )
                if self.uploads is not None and kind == "step":
                    self.uploads.add(place)
        self.log.restart_clock()

    def _stop_if_asked(self) -> None:
        asked, disk_is_low = self.cpu_group.all_reduce_any(
            self.stop.requested, self.is_main and self.disk.must_stop(self.stop, self.reporter.log)
        )
        if asked or disk_is_low:
            self._save()
            self.cpu_group.barrier()  # a launcher ends them all once one has left, the one that still writes too
        if asked:
            raise StageStopped
        if disk_is_low:
            raise UserError(
                f"{self.disk.what_is_wrong()}. Step {self.step} is saved; free some, and run this again to go on from there"
            )

    def _validate_if_due(self) -> None:
        if not self.validation_schedule.are_due(self.step):
            return
        self.log.report()
        with self.trainable.summon_full_params(self.device):
            if self.validator is not None:
                self.validator.take(self.step, self.unet_module, self.shown)
        self.cpu_group.barrier()
        self.log.restart_clock()


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for this device and the CPU, where LyCORIS decides on whole modules; that asks devices that are not there too."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
