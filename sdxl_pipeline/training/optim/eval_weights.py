"""Which weights of a run are drawn and written: those that are trained, the optimizer's own average of them, or their EMA."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import EMA_FOLDER, ValidationImage
from sdxl_pipeline.training.optim.ema import Ema, replaced

EMA_LABEL = " EMA"
"""Ends the names of the images that the average draws."""


class EvalWeights:
    """What stands for a run's result while the run goes on. `optimizer` is the library's own, without what accelerate wraps around it."""

    def __init__(
        self,
        settings: TrainingSettings,
        optimizer: Optimizer,
        parameters: Mapping[str, Parameter],
        device: torch.device,
    ) -> None:
        self._settings, self._optimizer, self._parameters = settings, optimizer, parameters
        self.ema = Ema(settings, parameters, device) if settings.use_ema else None
        if settings.is_schedule_free:
            optimizer.train()  # type: ignore[attr-defined]

    def scalars(self, step: int) -> dict[str, float]:
        """What is to be logged of optimizer step `step` beside its loss."""
        return {} if self.ema is None else {"ema_decay": self.ema.decay(step)}

    @property
    def are_trained(self) -> bool:
        """Whether the weights that are written are those that the next step starts from."""
        return not self._settings.is_schedule_free

    def update(self, step: int) -> None:
        """Take in what optimizer step `step`, counted from 1, has made of the parameters."""
        if self.ema is not None:
            self.ema.update(step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters are the run's result as of now: without a change, but for a schedule-free optimizer, whose result is an average."""
        if self.are_trained:
            yield
            return
        with replaced(self._parameters):
            self._optimizer.eval()  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self._optimizer.train()  # type: ignore[attr-defined]

    @contextmanager
    def released(self) -> Iterator[None]:
        """The parameters are what `released_weights` publishes."""
        if self.ema is not None and self._settings.released_weights == "ema":
            with self.ema.applied():
                yield
        else:
            with self.in_place():
                yield

    def drawn(
        self, draw: Callable[[str], Iterator[ValidationImage]]
    ) -> Generator[ValidationImage, None, None]:
        """The images that `draw` makes, of each of the weights that `ema_validation` asks for; it is given what to add to their names."""
        compared = self._settings.ema_validation
        if self.ema is None or compared != "ema_only":
            with self.in_place():
                yield from draw("")
        if self.ema is not None and compared != "none":
            with self.ema.applied():
                yield from draw(EMA_LABEL)

    def write(self, folder: Path, write: Callable[[Path], None], name: str) -> Path:
        """Let `write` write the result to `folder/name`, and the average to the same name in `folder/ema`; gives the first place."""
        with self.in_place():
            write(folder / name)
        if self.ema is not None:
            (folder / EMA_FOLDER).mkdir(exist_ok=True)
            with self.ema.applied():
                write(folder / EMA_FOLDER / name)
        return folder / name

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must know: the average, if there is one."""
        return {} if self.ema is None else self.ema.average

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Be as `state` was."""
        if self.ema is not None:
            self.ema.restore(average)
