"""The weights of a run that are evaluated and written: the trained ones, a schedule-free optimizer's average of them, or their EMA."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sdxl_pipeline.config.schema.ema import EmaSettings
from sdxl_pipeline.runtime.specs import EMA_FOLDER, ValidationImage
from sdxl_pipeline.training.optim.ema import Ema, preserved

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

    @contextmanager
    def released(self) -> Iterator[None]:
        """Set the parameters to what `released_weights` selects within the context."""
        if self.ema is not None and self._settings.released_weights == "ema":
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
