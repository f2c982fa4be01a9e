"""An exponential moving average of the trained parameters (Polyak and Juditsky 1992; Morales-Brotons et al. 2024)."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sdxl_pipeline.config.schema.optimization import EmaSettings
from sdxl_pipeline.runtime.specs import EMA_FOLDER, ValidationImage


class Ema:
    """The average of `parameters`, always float32: its updates are smaller than the spacing of bf16 values."""

    def __init__(
        self, settings: EmaSettings, parameters: Mapping[str, Parameter], device: torch.device
    ) -> None:
        self._settings, self._parameters = settings, parameters
        average_device = torch.device("cpu") if settings.ema_device == "cpu" else device
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(average_device, torch.float32, copy=True)
            for name, parameter in parameters.items()
        }

    def decay(self, step: int) -> float:
        """Return the decay of the update after optimizer step `step`, counted from 1.

        With n = step - 1: 0 at first, then (1 + n) / (10 + n), at most `ema_decay`; with `ema_warmup_steps`, 0 before that step and
        `ema_decay` from it on.
        """
        settings = self._settings
        if settings.ema_warmup_steps:
            return 0.0 if step < settings.ema_warmup_steps else settings.ema_decay
        return 0.0 if step <= 1 else min(step / (9 + step), settings.ema_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the parameters after optimizer step `step`, if `ema_update_interval` divides it."""
        if step % self._settings.ema_update_interval:
            return
        averages = list(self.average.values())
        current = [
            parameter.detach().to(average.device, torch.float32)
            for average, parameter in zip(averages, self._parameters.values(), strict=True)
        ]
        torch._foreach_lerp_(averages, current, 1 - self.decay(step))

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Load an average that was saved."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the parameters to the average within the context; restore them afterwards, bit for bit."""
        with preserved(self._parameters):
            for name, parameter in self._parameters.items():
                parameter.detach().copy_(self.average[name])
            yield


@contextmanager
def preserved(parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Restore the parameters when the context ends, bit for bit, whatever happened to them within it."""
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.detach().copy_(saved[name])


EMA_LABEL = " EMA"
"""Suffix of the names of the images generated with the EMA weights."""


class EvalWeights:
    """The evaluation weights of a run in progress. `optimizer` is the library's own, not accelerate's wrapper.

    A schedule-free optimizer is recognized by its `eval` mode, which replaces the parameters by their average (Defazio et al. 2024).
    """

    def __init__(
        self,
        settings: EmaSettings,
        optimizer: Optimizer,
        parameters: Mapping[str, Parameter],
        device: torch.device,
    ) -> None:
        self._settings, self._optimizer, self._parameters = settings, optimizer, parameters
        self.ema = Ema(settings, parameters, device) if settings.use_ema else None
        self._is_schedule_free = hasattr(optimizer, "eval")
        if self._is_schedule_free:
            optimizer.train()  # type: ignore[attr-defined]

    def scalars(self, step: int) -> dict[str, float]:
        """Return what is logged for optimizer step `step` beside its loss."""
        return {} if self.ema is None else {"ema_decay": self.ema.decay(step)}

    @property
    def writes_training_weights(self) -> bool:
        """Return whether the written weights are the parameters that the next step starts from."""
        return not self._is_schedule_free

    def update(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 1."""
        if self.ema is not None:
            self.ema.update(step)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Set the parameters to the evaluation weights within the context: unchanged, or a schedule-free optimizer's average."""
        if self.writes_training_weights:
            yield
            return
        with preserved(self._parameters):
            self._optimizer.eval()  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self._optimizer.train()  # type: ignore[attr-defined]

    @property
    def released_kind(self) -> Literal["trained", "ema"]:
        """Return which weights `released_weights` selects; the trained ones without an average."""
        return self._settings.released_weights if self.ema is not None else "trained"

    @contextmanager
    def released(self) -> Iterator[None]:
        """Set the parameters to those of `released_kind` within the context."""
        if self.ema is not None and self.released_kind == "ema":
            with self.ema.applied():
                yield
        else:
            with self.eval_mode():
                yield

    def sampled(
        self, generate: Callable[[str], Iterator[ValidationImage]]
    ) -> Generator[ValidationImage, None, None]:
        """Yield the images of `generate` for each of the weights that `ema_validation` selects; it takes a suffix for the image names."""
        selected = self._settings.ema_validation
        if self.ema is None or selected != "ema_only":
            with self.eval_mode():
                yield from generate("")
        if self.ema is not None and selected != "none":
            with self.ema.applied():
                yield from generate(EMA_LABEL)

    def write(self, folder: Path, write: Callable[[Path], None], name: str) -> Path:
        """Write the weights to `folder/name` with `write`, and the EMA to the same name in `folder/ema`; return the first path."""
        with self.eval_mode():
            write(folder / name)
        if self.ema is not None:
            (folder / EMA_FOLDER).mkdir(exist_ok=True)
            with self.ema.applied():
                write(folder / EMA_FOLDER / name)
        return folder / name

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: the EMA, if there is one."""
        return {} if self.ema is None else self.ema.average

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self.ema is not None:
            self.ema.restore(average)
