"""An exponential moving average of the trained parameters (Polyak and Juditsky 1992; Morales-Brotons et al. 2024)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_pipeline.config.schema.ema import EmaSettings


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
