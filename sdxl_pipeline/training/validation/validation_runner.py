"""Validation during training: images and eval loss. It changes nothing that the training computes with."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

from sdxl_pipeline.config.schema.evaluation import EvaluationSettings
from sdxl_pipeline.config.schema.validation import ValidationSettings
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.run_logs import EvalRow, eval_loss_log, validation_log
from sdxl_pipeline.training.optim.ema import EvalWeights
from sdxl_pipeline.training.validation.eval_loss import EvalImage, eval_loss
from sdxl_pipeline.training.validation.validation_images import ImageGenerator


@dataclass(frozen=True)
class ValidationSchedule:
    """The steps at which validation runs; the same on every process. Step 0 is before the first."""

    images: ValidationSettings
    losses: EvaluationSettings
    has_prompts: bool  # besides the unconditional one
    total_steps: int
    epochs_at: Callable[[int], float]  # epochs after a step

    def is_due(self, step: int) -> bool:
        """Return whether any validation is due after a step."""
        return self.images_are_due(step) or self.eval_loss_is_due(step)

    def images_are_due(self, step: int) -> bool:
        """Return whether validation images are due: at the end, at the intervals in steps and epochs, and at 0 by validation_on_startup."""
        settings = self.images
        has_prompts = self.has_prompts or not settings.validation_disable_unconditional
        if settings.validation_disable or not has_prompts:
            return False
        if step == 0 and settings.validation_on_startup is not None:
            return settings.validation_on_startup
        intervals = settings.validation_step_interval, settings.validation_epoch_interval
        return step == self.total_steps or ends_interval(step, *intervals, self.epochs_at)

    def eval_loss_is_due(self, step: int) -> bool:
        """Return whether the eval loss is due: if it is enabled, for the base model, at the intervals and at the end."""
        settings = self.losses
        if not settings.eval_loss_in_training:
            return False
        intervals = settings.eval_steps_interval, settings.eval_epoch_interval
        return step in (0, self.total_steps) or ends_interval(step, *intervals, self.epochs_at)


def ends_interval(
    step: int, step_interval: int | None, epoch_interval: float | None, epochs_at: Callable[[int], float]
) -> bool:
    """Return whether a step ends an interval of steps or is the first to complete one of epochs. Step 0 ends intervals of steps only."""
    if step_interval and step % step_interval == 0:
        return True
    if not epoch_interval or step == 0:
        return False
    # the tolerance is for rounding: three times a third of an epoch is slightly less than one
    after, before = (math.floor(epochs_at(at) / epoch_interval + 1e-9) for at in (step, step - 1))
    return after > before


class ValidationTimer:
    """Estimates the time of the remaining validations from the mean duration of those of this session, separately for each kind."""

    def __init__(self, schedule: ValidationSchedule, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._clock = schedule.total_steps, clock
        self._is_due = {"images": schedule.images_are_due, "eval_loss": schedule.eval_loss_is_due}
        self._durations: dict[str, list[float]] = {}  # seconds, by kind
        self._due_steps: dict[str, list[int]] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Measure a validation of one kind ("images" or "eval_loss"); one that raises is not counted."""
        start = self._clock()
        yield
        self._durations.setdefault(kind, []).append(self._clock() - start)

    def remaining_seconds(self, step: int) -> float:
        """Return the estimated seconds of the validations after this step and later ones; a kind not measured yet counts as 0."""
        seconds = 0.0
        for kind, durations in self._durations.items():
            if kind not in self._due_steps:
                self._due_steps[kind] = list(filter(self._is_due[kind], range(self._total_steps + 1)))
            remaining = len(self._due_steps[kind]) - bisect_left(self._due_steps[kind], step)
            seconds += remaining * sum(durations) / len(durations)
        return seconds


class _Stopped(Exception):  # noqa: N818  # ends the validation; the run saves a checkpoint afterwards
    pass


@dataclass(frozen=True)
class TrainingEvalLoss:
    """The eval loss of the weights in training, always on the same images, timesteps and noise."""

    objective: Objective  # on the CPU
    timesteps: Sequence[int]
    batch_size: int
    read_images: Callable[[], list[EvalImage]]
    """Called at every measurement: trained text encoders encode the captions again."""
    read_probe: Callable[[], list[EvalImage]]
    """The training images of the probe, likewise; empty without one."""

    def measure(
        self, unet: UNet2DConditionModel, on_batch: Callable[[int, int], None]
    ) -> tuple[LossSummary, LossSummary | None]:
        """Return the losses of `unet` on the eval and the probe images; its mode is restored. `on_batch` may raise to end the measurement."""
        was_training = unet.training
        try:
            loss = self._measure(unet, self.read_images(), on_batch)
            probe = self.read_probe()
            return loss, self._measure(unet, probe, on_batch) if probe else None
        finally:
            unet.train(was_training)

    def _measure(
        self, unet: UNet2DConditionModel, images: list[EvalImage], on_batch: Callable[[int, int], None]
    ) -> LossSummary:
        return eval_loss(unet, self.objective, images, self.timesteps, self.batch_size, on_batch)


class Validator:
    """Runs the validations that are due on the main process, records them in `run_dir` and notifies the observer.

    A run that resumes at step `resumed_at` repeats none. `eval_loss` may be None if the schedule has none.
    """

    def __init__(
        self,
        run_dir: Path,
        schedule: ValidationSchedule,
        images: ImageGenerator,
        eval_loss: TrainingEvalLoss | None,
        resumed_at: int,
        observer: RunObserver,
        stop: StopSignal,
    ) -> None:
        self._schedule, self._images, self._eval_loss = schedule, images, eval_loss
        self._timer = ValidationTimer(schedule)
        self._observer, self._stop = observer, stop
        self._image_log = validation_log(run_dir, resumed_at)
        self._eval_log = eval_loss_log(run_dir, resumed_at)

    def run(
        self, step: int, unet: UNet2DConditionModel, eval_weights: EvalWeights, is_last: bool = False
    ) -> None:
        """Run what is due after a step, with the weights of `unet` that `eval_weights` selects, and restore the weights. A stop ends it early.

        With `is_last` the run ends at this step, and the validation images of the end are due.
        """
        measured = self._eval_loss
        if measured is not None and self._schedule.eval_loss_is_due(step) and not self._eval_log.has(step):
            try:
                with self._timer.measure("eval_loss"), eval_weights.released():
                    loss, probe = measured.measure(unet, lambda *_: self._raise_if_stopped())
            except _Stopped:
                return
            row = EvalRow(step=step, loss=loss, probe=probe, weights=eval_weights.released_kind)
            self._eval_log.append([row])
            self._observer.on_eval_loss(step, loss, probe)
        due = self._schedule.images_are_due(self._schedule.total_steps if is_last else step)
        if due and not self._image_log.has(step):
            with self._timer.measure("images"):
                self._generate_images(step, unet, eval_weights)

    def remaining_seconds(self, step: int) -> float:
        """Return the estimated seconds of the validations after this step and later ones."""
        return self._timer.remaining_seconds(step)

    def _raise_if_stopped(self) -> None:
        if self._stop.requested:
            raise _Stopped

    def _generate_images(self, step: int, unet: UNet2DConditionModel, eval_weights: EvalWeights) -> None:
        generate = partial(self._images.generate, unet, step, on_step=self._raise_if_stopped)
        images = []
        # closing restores the weights at once, after a stop as well
        with suppress(_Stopped), closing(eval_weights.sampled(generate)) as generated:
            for image in generated:
                images.append(image)
                self._observer.on_image(image)
                self._raise_if_stopped()
        if self._stop.requested:
            return
        self._image_log.append(images)
        self._observer.on_images(images)
