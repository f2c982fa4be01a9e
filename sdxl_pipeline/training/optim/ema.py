"""An exponential moving average of what is trained (Polyak and Juditsky 1992; Morales-Brotons et al. 2024)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from sdxl_pipeline.config.schema.training import TrainingSettings


class Ema:
    """The average of `parameters`, float32 whatever they are held in, since it moves by less than bf16's numbers lie apart."""

    def __init__(
        self, settings: TrainingSettings, parameters: Mapping[str, Parameter], device: torch.device
    ) -> None:
        self._settings, self._parameters = settings, parameters
        place = torch.device("cpu") if settings.ema_device == "cpu" else device
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(place, torch.float32, copy=True)
            for name, parameter in parameters.items()
        }

    def decay(self, step: int) -> float:
        """The share of the average that stays at the update after optimizer step `step`, counted from 1.

        With n = step - 1: 0 at first, then (1 + n) / (10 + n), at most `ema_decay`; with `ema_warmup_steps`, 0 before that step and
        `ema_decay` from it on.
        """
        settings = self._settings
        if settings.ema_warmup_steps:
            return 0.0 if step < settings.ema_warmup_steps else settings.ema_decay
        return 0.0 if step <= 1 else min(step / (9 + step), settings.ema_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as optimizer step `step` left them, if `ema_update_interval` says so."""
        if step % self._settings.ema_update_interval:
            return
        averages = list(self.average.values())
        current = [
            parameter.detach().to(average.device, torch.float32)
            for average, parameter in zip(averages, self._parameters.values(), strict=True)
        ]
        torch._foreach_lerp_(averages, current, 1 - self.decay(step))

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Be the average that was saved."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average meanwhile, and afterwards what they were, to the bit."""
        with replaced(self._parameters):
            for name, parameter in self._parameters.items():
                parameter.detach().copy_(self.average[name])
            yield


@contextmanager
def replaced(parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Whatever becomes of the parameters meanwhile, they are afterwards what they were, to the bit."""
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.detach().copy_(kept[name])
