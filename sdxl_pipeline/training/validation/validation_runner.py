"""The looks a training takes at what it has learnt: validation images and the eval loss. They change nothing it computes with."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from sdxl_pipeline.models.components import latent_scaling_factor
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import LossSummary, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.logging.eval_log import EvalLog, EvalRow
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.validation_log import ValidationLog
from sdxl_pipeline.training.optim.eval_weights import EvalWeights
from sdxl_pipeline.training.validation.eval_images import read_images
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps
from sdxl_pipeline.training.validation.eval_samples import choose_samples
from sdxl_pipeline.training.validation.previews import Previews
from sdxl_pipeline.training.validation.validation_images import (
    generate_validation_images,
    is_due,
    is_validation_step,
)


class _Stopped(Exception):  # noqa: N818  # the look is given up, the run has still to save
    pass


@dataclass(frozen=True)
class ValidationSchedule:
    """When looks are due; every process knows."""

    spec: TrainSpec
    total_steps: int
    epochs_at: Callable[[int], float]  # passes over the training images after a step

    def images_are_due(self, step: int) -> bool:
        """Whether validation images are drawn after a step; step 0 is before the first."""
        return is_validation_step(self.spec, step, self.total_steps, self.epochs_at)

    def eval_loss_is_due(self, step: int) -> bool:
        """Whether the eval loss is taken after a step: when it is asked for at all, of the base model and at the end as well."""
        settings = self.spec.settings
        if not settings.eval_loss_in_training:
            return False
        intervals = settings.eval_steps_interval, settings.eval_epoch_interval
        return step in (0, self.total_steps) or is_due(step, *intervals, self.epochs_at)

    def are_due(self, step: int) -> bool:
        """Whether any look is."""
        return self.images_are_due(step) or self.eval_loss_is_due(step)


class ValidationCosts:
    """How long the looks to come will take, going by those that this session has taken. Each kind costs its own."""

    def __init__(self, times: ValidationSchedule, clock: Callable[[], float] = time.monotonic) -> None:
        self._last, self._clock = times.total_steps, clock
        self._are_due = {"images": times.images_are_due, "eval_loss": times.eval_loss_is_due}
        self._taken: dict[str, list[float]] = {}  # seconds each
        self._due: dict[str, list[int]] = {}  # steps

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Take a look of one kind within; one that raises is not counted."""
        began = self._clock()
        yield
        self._taken.setdefault(kind, []).append(self._clock() - began)

    def to_come(self, step: int) -> float:
        """Seconds that the looks after this step and all later ones will take; those of a kind not yet taken count as nothing."""
        seconds = 0.0
        for kind, taken in self._taken.items():
            if kind not in self._due:
                self._due[kind] = list(filter(self._are_due[kind], range(self._last + 1)))
            left = len(self._due[kind]) - bisect_left(self._due[kind], step)
            seconds += left * sum(taken) / len(taken)
        return seconds


class Validator:
    """Takes the looks that are due, on the main process, and records and tells what it saw; a run that resumes repeats none.

    What they need is found when this is made: raises UserError for a tiny autoencoder that cannot be had, and when there is no image
    to take the eval loss of.
    """

    def __init__(
        self,
        times: ValidationSchedule,
        reader: BatchReader,
        objective: Objective,
        device: torch.device,
        resumed_at: int,
        watch: RunObserver,
        reporter: Reporter,
        stop: StopSignal,
    ) -> None:
        spec = times.spec
        run_dir = Path(spec.run_dir)
        self._times, self._spec, self._reader = times, spec, reader
        self._costs = ValidationCosts(times)
        self._watch, self._stop = watch, stop
        self._folder = run_dir / "validation"
        self._drawn = ValidationLog(run_dir, resumed_at)
        self._taken = EvalLog(run_dir, resumed_at)
        draws = times.images_are_due(times.total_steps)
        self._previews = (
            Previews(spec, device, run_dir / "previews", watch.preview)
            if spec.settings.validation_preview and draws
            else None
        )
        # Of the objective only what decides target and noise: weights, offsets and their like stay out of the eval loss.
        self._objective = Objective(objective.alphas_cumprod.cpu(), objective.prediction_type)
        if spec.settings.eval_loss_in_training:
            source, samples = choose_samples(spec.datasets, spec.settings)
            if not samples:
                raise UserError(
                    "there is no image to take the eval loss of: the datasets' aspect_buckets have no rows"
                )
            reporter.log(f"The eval loss is taken of {len(samples)} images ({source}).")
            self._read_images = partial(read_images, samples, reader, latent_scaling_factor(spec.base_model))
            # text encoders that are trained read the captions anew at each look
            self._images = None if reader.online_text_encoder else self._read_images()

    def take(self, step: int, unet: UNet2DConditionModel, shown: EvalWeights) -> None:
        """Take what is due after a step with those weights of the UNet that `shown` says, and leave it as it was. A stop ends it early."""
        if self._times.eval_loss_is_due(step) and not self._taken.has(step):
            try:
                with self._costs.timed("eval_loss"), shown.released():
                    loss = self._eval_loss(unet)
            except _Stopped:
                return
            self._taken.add(EvalRow(step=step, loss=loss))
            self._watch.eval_loss(step, loss)
        if self._times.images_are_due(step) and not self._drawn.has(step):
            with self._costs.timed("images"):
                self._draw(step, unet, shown)

    def seconds_to_come(self, step: int) -> float:
        """What the looks after this step and all later ones will take."""
        return self._costs.to_come(step)

    def _eval_loss(self, unet: UNet2DConditionModel) -> LossSummary:
        timesteps = eval_timesteps(self._spec.settings.eval_timesteps, len(self._objective.alphas_cumprod))
        batch_size = self._spec.settings.train_batch_size

        was_training = unet.training
        try:
            images = self._images or self._read_images()
            return eval_loss(
                unet, self._objective, images, timesteps, batch_size, lambda *_: self._give_up_if_stopped()
            )
        finally:
            unet.train(was_training)

    def _give_up_if_stopped(self) -> None:
        if self._stop.requested:
            raise _Stopped

    def _draw(self, step: int, unet: UNet2DConditionModel, shown: EvalWeights) -> None:
        draw = partial(
            generate_validation_images,
            self._spec,
            unet,
            self._reader,
            step,
            self._folder,
            self._previews,
            on_step=self._give_up_if_stopped,
        )
        images = []
        # closed, so that a stop, too, puts the weights back at once
        with suppress(_Stopped), closing(shown.drawn(draw)) as drawn:
            for image in drawn:
                images.append(image)
                self._watch.image(image)
                self._give_up_if_stopped()
        if self._stop.requested:
            return
        self._drawn.add(images)
        self._watch.images(images)
