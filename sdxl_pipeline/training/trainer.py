"""The training loop with its setup, checkpoints and resume. The loss of a batch is in diffusion/batch_loss.py."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.models.components import load_noise_scheduler
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EarlyStop, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.training.checkpoint.checkpoint_files import CHECKPOINTS
from sdxl_pipeline.training.checkpoint.checkpoint_schedule import (
    CheckpointKind,
    checkpoint_due,
    checkpoint_limit,
)
from sdxl_pipeline.training.checkpoint.checkpoint_uploads import CheckpointUploads
from sdxl_pipeline.training.checkpoint.checkpoints import (
    TrainingState,
    clear_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    require_same_parameters,
    save_checkpoint,
)
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor
from sdxl_pipeline.training.checkpoint.run_identity import read_lineage
from sdxl_pipeline.training.checkpoint.warm_start import rebase_state
from sdxl_pipeline.training.data.batches import Batch, BatchReader, prefetch
from sdxl_pipeline.training.data.bucket_sampler import total_planned_steps
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.diffusion.batch_loss import BatchLoss
from sdxl_pipeline.training.diffusion.objective import build_objective
from sdxl_pipeline.training.diffusion.scheduled_sampling import build_solver
from sdxl_pipeline.training.distributed.sharding import CpuGroup, shard_like, to_full_tensor
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.run_logs import metrics_log
from sdxl_pipeline.training.logging.step_log import StepLog, StepRecord
from sdxl_pipeline.training.memory.memory_estimate import report_memory_estimate
from sdxl_pipeline.training.optim.ema import EvalWeights
from sdxl_pipeline.training.optim.lr_schedules import build_schedule
from sdxl_pipeline.training.optim.non_finite import propagate_nonfinite, step_if_finite
from sdxl_pipeline.training.optim.optimizers import build_optimizer, cast_parameters, current_lr
from sdxl_pipeline.training.rng import derive_seed
from sdxl_pipeline.training.trainer_setup import (
    base_dtype,
    build_accelerator,
    build_batches,
    build_samplers,
    build_trainable,
    build_validation_schedule,
    build_validator,
    trained_dtype,
)
from sdxl_pipeline.training.validation.early_stopping import Decision, decide_for_run
from sdxl_pipeline.training.validation.validation_runner import Validator

REPORT_INTERVAL = 10
"""Optimizer steps between two reports: fetching the losses is the only time when the loop waits for the device."""


class Trainer:
    """One run: setup in the constructor, then `train`, then `export`.

    Training changes the trained parameters and their EMA, the optimizer, the learning-rate schedule, the loss scaler and the step. All of it
    goes through `state()` and `restore()`. Hold the run's lock (`run_lock`) on the main process for the lifetime of the trainer, and enter
    its `observer` as a context manager. A run without an observer skips validation.

    For the manifest of the finished run: `step`, `epochs_at(step)`, `images_trained`, `seconds` and `log.training_seconds` count what was
    trained, `resumed_from` is the step at which this session started if not at 0, `stopped_early` is set on the main process if the run
    ended before `total_steps`, `samplers` describes the images, `memory` the estimate.
    """

    def __init__(
        self,
        spec: TrainSpec,
        identity: str,
        reporter: Reporter,
        stop: StopSignal,
        observer: RunObserver | None = None,
    ) -> None:
        self.spec, self.identity, self.reporter, self.stop = spec, identity, reporter, stop
        self.observer = observer
        settings = spec.settings
        self.run_dir = Path(spec.run_dir)
        self.disk = FreeDiskMonitor(self.run_dir, settings)
        self.start_time = time.monotonic()
        self.accumulation = settings.gradient_accumulation_steps
        self.accelerator = build_accelerator(spec)
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self.cpu_group = CpuGroup(self.accelerator.num_processes)

        self.samplers = build_samplers(spec, self.accelerator.num_processes, reporter)
        self.sampler = self.samplers.sampler
        self.total_steps = total_planned_steps(settings, self.sampler)

        scheduler = load_noise_scheduler(spec.base_model, settings.scheduler_changes)
        self.trainable = build_trainable(spec).to(self.device)
        self.batch_loss = BatchLoss(
            build_objective(settings, scheduler),
            build_solver(settings, scheduler),
            self.trainable,
            base_dtype(spec),
            self.device,
        )
        encoders = OnDemandEncoders(spec.base_model, spec.hardware)
        self.reader = BatchReader(spec.datasets, encoders, self.trainable.online_text_encoder)
        self.batches = build_batches(
            spec,
            self.reader,
            self.samplers.prefetch,
            self.accelerator.process_index,
            scheduler.config.num_train_timesteps,
        )

        self.parameters = self.trainable.parameters
        cast_parameters(self.parameters.values(), trained_dtype(settings), settings.gradient_precision)
        self.optimizer = self.accelerator.prepare(
            build_optimizer(
                settings,
                self.trainable.unet_parameters,
                self.accelerator.num_processes,
                self.trainable.text_parameters,
                settings.text_encoder_lr,
            )
        )
        self.lr_schedule = build_schedule(settings, self.optimizer.optimizer, self.total_steps)
        self.unet = self.trainable.prepare(self.accelerator)
        self.eval_weights = EvalWeights(settings, self.optimizer.optimizer, self.parameters, self.device)
        self.memory = report_memory_estimate(
            spec, self.trainable, self.sampler.samples, self.device, reporter.log if self.is_main else None
        )

        pushes = settings.push_to_hub and settings.push_checkpoints_to_hub and self.is_main
        self.uploads = CheckpointUploads(settings, self.run_dir, reporter.log) if pushes else None

        self.step = 0
        self._previous_seconds = self._previous_training_seconds = 0.0  # of the sessions before this one
        self.resumed_from: int | None = None
        self._saved_step: int | None = None  # the step of the latest checkpoint
        self._resume()

        self.stopped_early: EarlyStop | None = None
        self.validation_schedule = build_validation_schedule(spec, self.sampler, self.total_steps)
        self.validator: Validator | None = None
        if self.observer is not None:
            self.validator = build_validator(
                spec,
                schedule=self.validation_schedule,
                reader=self.reader,
                scheduler=scheduler,
                device=self.device,
                resumed_at=self.step,
                observer=self.observer,
                reporter=reporter,
                stop=stop,
            )
        self.log = StepLog(
            self.accelerator,
            reporter,
            sampler=self.sampler,
            total_steps=self.total_steps,
            training_seconds=self._previous_training_seconds,
            metrics=metrics_log(self.run_dir, self.step) if self.is_main else None,
            observer=self.observer,
            validator=self.validator,
        )

    def train(self) -> None:
        """Train from the current step to the last, or until early stopping ends the run. Raise StageStopped or UserError, after a checkpoint, on a stop request or a full disk."""
        self.unet.train()
        if self.observer is not None:
            self.observer.on_train_begin(self.step, self.total_steps)
        self.reporter.progress("train", self.step, self.total_steps, "steps")
        first, last = self.step * self.accumulation, self.total_steps * self.accumulation
        self.log.restart_clock()
        with closing(prefetch(self.batches, first, last, pin=self.device.type == "cuda")) as batches:
            while True:
                if self.validation_schedule.is_due(self.step):
                    self.validate()
                self._end_if_requested()
                if self.step >= self.total_steps or self._stops_early():
                    break
                self.train_step(batches)
                self.reporter.progress("train", self.step, self.total_steps, "steps")
                if self.step % REPORT_INTERVAL == 0:
                    self.log.report()
                kind = checkpoint_due(self.spec.settings, self.step, self.total_steps, self.epochs_at)
                if kind is not None:
                    self.save(kind)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Take one optimizer step over the next `gradient_accumulation_steps` batches."""
        losses, images = [], 0
        for micro_step in range(self.accumulation):
            is_last = micro_step == self.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                batch = next(batches)
                loss = self._loss(batch, self.step * self.accumulation + micro_step) * batch.step_weight
                self.accelerator.backward(propagate_nonfinite(loss))
            losses.append(loss.detach())
            images += batch.images
        self.accelerator.unscale_gradients()
        grad_norm = to_full_tensor(self._clip_gradients())
        scheduled_lr = float(self.lr_schedule.get_last_lr()[0])
        step_if_finite(self.optimizer, grad_norm)
        self.lr_schedule.step()
        # accelerate's own zero_grad inspects the optimizer's signature at each step
        self.optimizer.optimizer.zero_grad()
        self.step += 1
        self.eval_weights.update(self.step)
        lr, scalars = current_lr(self.optimizer, scheduled_lr), self.eval_weights.scalars(self.step)
        self.log.add(StepRecord(self.step, torch.stack(losses), grad_norm, lr, images, scalars))

    def _clip_gradients(self) -> Tensor:
        """Clip by norm or by value, as `grad_clip_method` says, and return the total gradient norm before clipping, ()."""
        settings, parameters = self.spec.settings, list(self.parameters.values())
        bound = settings.max_grad_norm or math.inf
        if settings.grad_clip_method == "norm":
            return torch.nn.utils.clip_grad_norm_(parameters, bound)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grad_value_(parameters, bound)
        return norm

    def _loss(self, batch: Batch, index: int) -> Tensor:
        """Return the mean loss of one batch, (); `index` counts the batches of this process since the start of the run."""
        # Adapter dropout is the only random choice that reads torch's global generators.
        seed = derive_seed(self.spec.settings.seed, "dropout", index, self.accelerator.process_index)
        _seed_generators(self.device, seed)
        return self.batch_loss(self.unet, batch.to(self.device))

    def validate(self, is_last: bool = False) -> None:
        """Run the validations that are due, and with `is_last` those of the end; on the main process with the full weights, the others wait."""
        self.log.report()
        with self.trainable.summon_full_params(self.device):
            if self.validator is not None:
                self.validator.run(self.step, self.unet_module, self.eval_weights, is_last)
        self.cpu_group.barrier()
        self.log.restart_clock()

    def save(self, kind: CheckpointKind = "step") -> None:
        """Save a checkpoint on the main process. All processes must call it together."""
        self.log.report()
        self.reader.flush()
        with self.trainable.summon_full_params(torch.device("cpu")):
            state = self.state()
            if self.is_main:
                checkpoint = save_checkpoint(
                    self.run_dir / CHECKPOINTS,
                    self.identity,
                    state,
                    export=self.export,
                    exports_parameters=self.trainable.export_is_exact
                    and self.eval_weights.writes_training_weights,
                    export_bytes=self.export_bytes,
                    limit=checkpoint_limit(self.spec.settings, kind),
                    kind=kind,
                    lineage=read_lineage(self.run_dir),
                    best_step=self._early_stopping().best_step,
                )
                if self.uploads is not None and kind == "step":
                    self.uploads.add(checkpoint)
        self._saved_step = self.step
        self.log.restart_clock()

    def _resume(self) -> None:
        """Load the latest checkpoint of this run, if there is one."""
        root = self.run_dir / CHECKPOINTS
        resumes = self.spec.settings.resume_from_checkpoint is not None
        if self.is_main:
            clear_checkpoints(root, unfinished_only=resumes)
        self.accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(root, self.identity, self.reporter.log)
        if checkpoint is not None:
            self.restore(load_checkpoint(checkpoint))
            self.resumed_from = self._saved_step = self.step
            self.reporter.log(f"Resuming from {checkpoint}, step {self.step} of {self.total_steps}.")

    def _early_stopping(self) -> Decision:
        """Return what the eval losses so far decide. For the main process, which measures them."""
        return decide_for_run(
            self.run_dir, self.spec.settings, self.step, self.validation_schedule.eval_loss_is_due
        )

    def _stops_early(self) -> bool:
        """Return whether early stopping ends the run now, the same on all processes.

        Save a checkpoint then, and if this step has the best eval loss. Validation images of the end are generated before.
        """
        patience = self.spec.settings.early_stopping_patience
        if patience is None or not self.validation_schedule.eval_loss_is_due(self.step):
            return False
        decision = self._early_stopping() if self.is_main else Decision(None, None)
        is_best, stops = self.cpu_group.all_reduce_any(
            decision.best_step == self.step, decision.stop is not None
        )
        if (is_best or stops) and self.step != self._saved_step:
            self.save("step" if stops else "best")
        if stops:
            self.stopped_early = decision.stop
            if self.observer is not None and decision.stop is not None:
                self.observer.on_early_stop(decision.stop, self.total_steps)
            self.validate(is_last=True)
            self._end_if_requested()
        return stops

    def _end_if_requested(self) -> None:
        """Save a checkpoint and raise `_stop_error` on all processes together, if there is one."""
        if (error := self._stop_error()) is not None:
            if self.step != self._saved_step:  # a rolling checkpoint is enough to resume from
                self.save()
            self.cpu_group.barrier()  # torchrun ends all processes once one has left, the one that writes included
            raise error

    def _stop_error(self) -> StageStopped | UserError | None:
        """Return the error that ends the run now, if any process has a stop request or the disk is nearly full; the same on all processes."""
        stop_requested, disk_is_low = self.cpu_group.all_reduce_any(
            self.stop.requested, self.is_main and self.disk.must_stop(self.stop, self.reporter.log)
        )
        if stop_requested:
            return StageStopped()
        if disk_is_low:
            return UserError(
                f"{self.disk.describe_shortage()}. Step {self.step} is saved; free some space, then run this again to resume from it"
            )
        return None

    def state(self) -> TrainingState:
        """Return everything that training has changed. All processes must call it together, inside `summon_full_params`."""
        scaler = self.accelerator.scaler
        return TrainingState(
            step=self.step,
            seconds=self.seconds,
            training_seconds=self.log.training_seconds,
            parameters=self.trainable.full_state_dict(),
            optimizer=self.trainable.full_optimizer_state_dict(self.optimizer.state_dict()),
            schedule=self.lr_schedule.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            average=self.eval_weights.state(),
            epochs=self.epochs_at(self.step),
            samples=self.images_trained,
        )

    def restore(self, state: TrainingState) -> None:
        """Load what `state()` returned. Raise UserError if its parameters are not those of this run."""
        require_same_parameters(state, self.parameters)
        if not state.same_trajectory:
            state = rebase_state(state, self.spec.settings, self.optimizer.optimizer, self.lr_schedule)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(shard_like(state.parameters[name], parameter))
        self.optimizer.load_state_dict(self.trainable.shard_optimizer_state_dict(state.optimizer))
        self.lr_schedule.load_state_dict(state.schedule)
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.eval_weights.restore(state.average)
        self.step = state.step
        self._previous_seconds, self._previous_training_seconds = state.seconds, state.training_seconds

    @property
    def seconds(self) -> float:
        """Return the wall-clock seconds of all sessions of the run, each up to its last checkpoint."""
        return self._previous_seconds + time.monotonic() - self.start_time

    @property
    def images_trained(self) -> int:
        """Return the number of images trained on so far, repeats included."""
        return self.sampler.images_until(self.step * self.accumulation)

    def epochs_at(self, step: int) -> float:
        """Return the epochs after a step, as a fraction."""
        return self.sampler.epochs_after(step * self.accumulation)

    @property
    def unet_module(self) -> UNet2DConditionModel:
        """Return the UNet without the data-parallel wrapper."""
        return self.trainable.unet

    @property
    def export_bytes(self) -> int:
        """Return the size of what `export` writes, within a few kilobytes. For the main process, inside `summon_full_params`."""
        return self.trainable.export_bytes * (1 if self.eval_weights.ema is None else 2)

    def export(self, folder: Path) -> Path:
        """Write the trained weights into `folder` in the format that users load, and return their path. Deterministic: same run, same bytes."""
        # the digest of the base model rather than its path, because the file may be published
        metadata = {
            "base_model_sha256": self.spec.base_model.digest,
            "identity": self.identity,
            "step": str(self.step),
        }
        write = partial(self.trainable.write, metadata=metadata)
        return self.eval_weights.write(folder, write, self.trainable.weights_name)

    def close(self) -> None:
        """Close the data reader and leave the process group."""
        self.reader.close()
        self.accelerator.end_training()


def _seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators of `device` and of the CPU, where LyCORIS samples module dropout.

    `torch.manual_seed` is avoided because it also queries device types that are not present.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
