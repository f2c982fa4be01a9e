"""The training loop, and what it needs to start, save and go on."""

import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.protocol.program import StageError, StageStopped, StopSignal
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.protocol.specs import TrainSpec
from sdxl_pipeline.sdxl.adapters import save_lora
from sdxl_pipeline.sdxl.components import latent_scaling_factor, load_noise_scheduler
from sdxl_pipeline.training.batches import Batch, BatchReader, TrainingBatches, prefetched
from sdxl_pipeline.training.checkpoints import (
    TrainingState,
    clear_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from sdxl_pipeline.training.draws import seed_for
from sdxl_pipeline.training.metrics import METRICS_FILE, MetricsLog, StepMetrics
from sdxl_pipeline.training.objective import Objective
from sdxl_pipeline.training.on_demand import OnDemandEncoders
from sdxl_pipeline.training.optimizers import build_optimizer, build_schedule
from sdxl_pipeline.training.order import SampleOrder
from sdxl_pipeline.training.passes import planned_passes
from sdxl_pipeline.training.samples import load_samples
from sdxl_pipeline.training.trackers import Trackers, require_tracker
from sdxl_pipeline.training.unet import base_dtype, trainable_unet
from sdxl_pipeline.training.validation import draw_pictures, is_validation_step
from sdxl_pipeline.training.validation_log import ValidationLog

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"

REPORT_INTERVAL = 10
"""Optimizer steps between two looks at the losses, the only moments when the loop waits for the device."""

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: as long as the first may draw validation pictures."""


class Trainer:
    """One run of one identity: setup here, then `train`, then `write_weights`.

    The state that training changes is the trainable parameters, the optimizer, the schedule, the loss scaler and the step; `state` and
    `restore` are the only ways out and in. Hold the run's lock (`run_lock`) on the main process meanwhile.
    """

    def __init__(self, spec: TrainSpec, identity: str, reporter: Reporter, stop: StopSignal) -> None:
        self.spec, self.identity, self.reporter, self.stop = spec, identity, reporter, stop
        settings = spec.settings
        for tracker in settings.report_to:
            require_tracker(tracker)  # before minutes are spent on loading
        self.run_dir = Path(spec.run_dir)
        self.started = time.monotonic()
        self.accumulation = settings.gradient_accumulation_steps
        self.accelerator = _accelerator(spec)
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self.dtype = base_dtype(spec)
        # for what the processes say to each other without their devices
        self._host_group = (
            torch.distributed.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None
        )

        samples = load_samples(spec.lanes, "train", settings.micro_conditioning)
        processes = self.accelerator.num_processes
        self.passes = planned_passes(spec.lanes, samples, settings, processes)
        order = partial(
            SampleOrder,
            samples,
            self.passes.by_dataset,
            settings.seed,
            settings.train_batch_size,
            processes,
        )
        self.order = order()
        self._report_order()
        self.total_steps = settings.max_train_steps or math.ceil(
            self.order.batches_until(settings.num_train_epochs or 1) / self.accumulation
        )

        scheduler = load_noise_scheduler(spec.base_model)
        self.objective = Objective(
            scheduler.alphas_cumprod.to(self.device),
            settings.prediction_type or scheduler.config.prediction_type,
            settings.snr_gamma,
        )
        self.reader = BatchReader(spec.lanes, OnDemandEncoders(spec.base_model, spec.hardware))
        self.batches = TrainingBatches(
            order=order(),  # its own, since a thread reads ahead with it
            reader=self.reader,
            scaling_factor=latent_scaling_factor(spec.base_model),
            num_train_timesteps=scheduler.config.num_train_timesteps,
            caption_dropout_probability=settings.caption_dropout_probability,
            rank=self.accelerator.process_index,
        )

        unet = trainable_unet(spec).to(self.device)
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        self.optimizer = self.accelerator.prepare(build_optimizer(settings, self.parameters.values()))
        self.schedule = build_schedule(settings, self.optimizer.optimizer, self.total_steps)
        self.unet = self.accelerator.prepare(unet)

        self.step = 0
        self.seconds_before = 0.0  # spent by earlier sessions
        self.training_seconds = 0.0  # spent in optimizer steps, by all sessions
        self.resumed_from: int | None = None
        self._resume()

        self.metrics = MetricsLog(self.run_dir / METRICS_FILE, self.step) if self.is_main else None
        self.drawn = ValidationLog(self.run_dir, self.step) if self.is_main else None
        self.trackers = Trackers(spec, identity, self.step) if self.is_main else None
        # of the steps since the last report: number, loss, gradient norm, learning rate
        self._unreported: list[tuple[int, Tensor, Tensor, float]] = []
        self._clock = time.monotonic()

    def train(self) -> None:
        """Train from where the run stands to its end. Raises StageStopped, after a checkpoint, when asked to stop."""
        self.unet.train()
        self.reporter.progress("train", self.step, self.total_steps, "steps")
        self._draw_if_due()
        self._stop_if_asked()
        first, last = self.step * self.accumulation, self.total_steps * self.accumulation
        self._clock = time.monotonic()
        with closing(prefetched(self.batches, first, last, pin=self.device.type == "cuda")) as batches:
            while self.step < self.total_steps:
                self._optimizer_step(batches)
                self.reporter.progress("train", self.step, self.total_steps, "steps")
                if self.step % REPORT_INTERVAL == 0:
                    self._report()
                if self._checkpoint_is_due():
                    self._save()
                self._draw_if_due()
                self._stop_if_asked()

    def _optimizer_step(self, batches: Iterator[Batch]) -> None:
        losses = []
        for part in range(self.accumulation):
            is_last = part == self.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.unet):
                loss = self._loss(next(batches), self.step * self.accumulation + part)
                self.accelerator.backward(loss / self.accumulation)
            losses.append(loss.detach())
        grad_norm = self.accelerator.clip_grad_norm_(
            self.parameters.values(), self.spec.settings.max_grad_norm or math.inf
        )
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._unreported.append((self.step, torch.stack(losses).mean(), grad_norm, lr))

    def _loss(self, batch: Batch, index: int) -> Tensor:
        """Mean loss of one batch, the `index`-th of this process since the start of the run."""
        # The adapter's dropout is the one random choice that torch's global state makes.
        torch.manual_seed(seed_for(self.spec.settings.seed, "dropout", index, self.accelerator.process_index))
        batch = batch.to(self.device)
        prediction = self.unet(
            self.objective.add_noise(batch.latents, batch.noise, batch.timesteps).to(self.dtype),
            batch.timesteps,
            encoder_hidden_states=batch.prompt_embeds.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": batch.pooled_prompt_embeds.to(self.dtype),
                "time_ids": batch.time_ids,  # float32: in bf16 an original width of 1820 would read as 1824
            },
            return_dict=False,
        )[0]
        return self.objective.losses(prediction, batch.latents, batch.noise, batch.timesteps).mean()

    def state(self) -> TrainingState:
        """Everything training has changed, as of now."""
        scaler = self.accelerator.scaler
        return TrainingState(
            step=self.step,
            seconds=self.seconds,
            training_seconds=self.training_seconds,
            parameters={name: parameter.detach() for name, parameter in self.parameters.items()},
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
        )

    def restore(self, state: TrainingState) -> None:
        """Be as `state` was."""
        if state.parameters.keys() != self.parameters.keys():
            raise StageError(
                f"the checkpoints in {self.run_dir} hold other parameters than this version trains; delete them to train from the start"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.parameters[name])
        self.optimizer.load_state_dict(state.optimizer)
        self.schedule.load_state_dict(state.schedule)
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step = state.step
        self.seconds_before, self.training_seconds = state.seconds, state.training_seconds

    @property
    def seconds(self) -> float:
        """Spent on the run by all its sessions, up to their last checkpoints."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def samples(self) -> int:
        """Pictures seen."""
        return self.step * self.accumulation * self.order.global_batch_size

    @property
    def pictures_per_epoch(self) -> dict[str, float]:
        """Appearances of pictures in an epoch, by dataset."""
        counts = self.order.samples.pictures_by_dataset()
        return {name: count * self.passes.by_dataset[name] for name, count in counts.items()}

    @property
    def epochs(self) -> float:
        """Passes over the training pictures."""
        epoch, place = self.order.locate(self.step * self.accumulation)
        return epoch + place / self.order.batches_in(epoch)

    @property
    def unet_module(self) -> UNet2DConditionModel:
        """The UNet itself, without what data parallelism wraps around it."""
        return self.accelerator.unwrap_model(self.unet)

    def write_weights(self, path: Path) -> None:
        """Write the LoRA in diffusers' format; the same run gives the same bytes."""
        save_lora(
            self.unet_module,
            path,
            # what the base model is, not where it lies: the file may be published
            {
                "base_model_sha256": self.spec.base_model.digest,
                "identity": self.identity,
                "step": str(self.step),
            },
        )

    def close(self) -> None:
        """End the trackers and leave the process group."""
        self.reader.close()
        if self.trackers is not None:
            self.trackers.close()
        self.accelerator.end_training()

    def _resume(self) -> None:
        root = self.run_dir / "checkpoints"
        resumes = self.spec.settings.resume_from_checkpoint is not None
        if self.is_main:
            clear_checkpoints(root, unfinished_only=resumes)
        self.accelerator.wait_for_everyone()
        place = latest_checkpoint(root, self.identity, self.reporter.log)
        if place is not None:
            self.restore(load_checkpoint(place))
            self.resumed_from = self.step
            self.reporter.log(f"Resuming from {place}, step {self.step} of {self.total_steps}.")

    def _checkpoint_is_due(self) -> bool:
        interval = self.spec.settings.checkpoint_step_interval
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def _save(self) -> None:
        self._report()
        self.reader.flush()
        if self.is_main:
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.identity,
                self.state(),
                export=lambda folder: self.write_weights(folder / WEIGHTS_FILE),
                limit=self.spec.settings.checkpoints_total_limit,
            )
        self._clock = time.monotonic()

    def _stop_if_asked(self) -> None:
        if self._anyone_asked_to_stop():
            self._save()
            raise StageStopped

    def _anyone_asked_to_stop(self) -> bool:
        """The same answer on every process, so that none goes on to wait for one that has left. Does not wait for the device."""
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        asked = torch.tensor([int(self.stop.requested)])
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self._host_group)
        return bool(asked.item())

    def _report(self) -> None:
        """Fetch the losses since the last report; write, show and check them."""
        if not self._unreported:
            return
        steps, losses, norms, rates = zip(*self._unreported, strict=True)
        self._unreported = []
        mean_losses = self.accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
        grad_norms = torch.stack(norms).tolist()
        elapsed = time.monotonic() - self._clock
        self.training_seconds += elapsed
        self._clock += elapsed
        per_step = self.accumulation * self.order.global_batch_size
        speed = per_step * len(steps) / elapsed
        for step, loss in zip(steps, mean_losses, strict=True):
            if not math.isfinite(loss):
                raise StageError(
                    f"the loss of step {step} is {loss}. Lower learning_rate ({self.spec.settings.learning_rate:g}), lengthen "
                    "lr_warmup_steps, or set mixed_precision to bf16 or no; the checkpoints written before that step are sound"
                )
        rows = [
            StepMetrics(step, loss, rate, norm if math.isfinite(norm) else None, speed)
            for step, loss, norm, rate in zip(steps, mean_losses, grad_norms, rates, strict=True)
        ]
        if self.metrics is not None and self.trackers is not None:
            self.metrics.append(rows)
            self.trackers.log(rows)
        shown = {
            "loss": sum(mean_losses) / len(rows),
            "lr": rows[-1].lr,
            "samples_per_second": speed,
            "eta_seconds": (self.total_steps - self.step) * per_step / speed,
        }
        if rows[-1].grad_norm is not None:
            shown["grad_norm"] = rows[-1].grad_norm
        self.reporter.metric(self.step, shown)

    def _draw_if_due(self) -> None:
        if not is_validation_step(self.spec, self.step, self.total_steps):
            return
        self._report()
        if self.drawn is not None and self.trackers is not None and not self.drawn.has(self.step):
            images = []
            for image in draw_pictures(
                self.spec, self.unet_module, self.reader, self.step, self.run_dir / "validation"
            ):
                images.append(image)
                self.reporter.image(image.name, image.path, image.prompt, self.step)
                if self.stop.requested:
                    break
            else:
                self.drawn.add(images)
                self.trackers.log_images(images)
        self.accelerator.wait_for_everyone()
        self._clock = time.monotonic()

    def _report_order(self) -> None:
        for dataset_id, repeats in self.passes.raised_repeats.items():
            self.reporter.log(
                f"The datasets do not fill a step: repeats of {dataset_id} is raised to {repeats} (allow_dataset_oversubscription)."
            )
        for (height, width), (have, added) in self.order.fillings().items():
            self.reporter.log(
                f"Bucket {width}x{height} has {have} pictures an epoch; {added} more are taken from its start to fill its last batch."
            )


def _accelerator(spec: TrainSpec) -> Accelerator:
    hardware = spec.hardware
    accelerator = Accelerator(
        cpu=hardware.device == "cpu",
        mixed_precision=spec.settings.mixed_precision or "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    if accelerator.device.type != hardware.device:
        raise StageError(
            f"the hardware profile {hardware.profile!r} asks for the device {hardware.device}, but torch has only "
            f"{accelerator.device.type} here; choose another profile, for example SDXL_HARDWARE=cpu"
        )
    if accelerator.num_processes != hardware.num_processes:
        raise StageError(
            f"the spec asks for {hardware.num_processes} processes, but {accelerator.num_processes} are running; "
            "start it with torchrun --nproc-per-node of that number"
        )
    return accelerator
