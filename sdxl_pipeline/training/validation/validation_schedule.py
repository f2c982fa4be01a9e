"""When validation images and eval losses are due, and how long the remaining ones will take."""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sdxl_pipeline.config.schema.training import TrainingSettings


@dataclass(frozen=True)
class ValidationSchedule:
    """The steps at which validation runs; the same on every process. Step 0 is before the first."""

    settings: TrainingSettings
    has_prompts: bool  # besides the unconditional one
    total_steps: int
    epochs_at: Callable[[int], float]  # epochs after a step

    def is_due(self, step: int) -> bool:
        """Return whether any validation is due after a step."""
        return self.images_are_due(step) or self.eval_loss_is_due(step)

    def images_are_due(self, step: int) -> bool:
        """Return whether validation images are due: at the end, at the intervals in steps and epochs, and at 0 by validation_on_startup."""
        settings = self.settings
        has_prompts = self.has_prompts or not settings.validation_disable_unconditional
        if settings.validation_disable or not has_prompts:
            return False
        if step == 0 and settings.validation_on_startup is not None:
            return settings.validation_on_startup
        intervals = settings.validation_step_interval, settings.validation_epoch_interval
        return step == self.total_steps or ends_interval(step, *intervals, self.epochs_at)

    def eval_loss_is_due(self, step: int) -> bool:
        """Return whether the eval loss is due: if it is enabled, for the base model, at the intervals and at the end."""
        settings = self.settings
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
