"""What the steps of a training come to: fetched from the device now and then, written, shown and checked."""

import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.reporter import Reporter
from sdxl_pipeline.training.metrics import MetricsLog, StepMetrics
from sdxl_pipeline.training.trackers import Trackers


@dataclass(frozen=True, slots=True)
class TakenStep:
    """One optimizer step, as the device knows it."""

    number: int  # 1 for the first
    loss: Tensor  # (), of this process, mean over accumulation
    grad_norm: Tensor  # (), of all processes together, before clipping
    lr: float


class StepLog:
    """Keeps steps on the device until `report`, the only moment when the training waits for it.

    Each process has one; `metrics` and `trackers` are the main process's alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reporter: Reporter,
        samples_per_step: int,
        total_steps: int,
        training_seconds: float,
        metrics: MetricsLog | None,
        trackers: Trackers | None,
    ) -> None:
        self._accelerator, self._reporter = accelerator, reporter
        self._samples_per_step, self._total_steps = samples_per_step, total_steps
        self._metrics, self._trackers = metrics, trackers
        self._kept: list[TakenStep] = []
        self.training_seconds = training_seconds
        """Spent in optimizer steps, by all sessions."""
        self.restart_clock()

    def add(self, step: TakenStep) -> None:
        """Keep a step for the next report."""
        self._kept.append(step)

    def restart_clock(self) -> None:
        """Leave out the time since the last report: it went into something else than steps."""
        self._clock = time.monotonic()

    def report(self) -> None:
        """Fetch the steps kept since the last report; write, show and check them."""
        if not self._kept:
            return
        kept, self._kept = self._kept, []
        losses: list[float] = self._accelerator.reduce(
            torch.stack([step.loss for step in kept]), reduction="mean"
        ).tolist()
        norms: list[float] = torch.stack([step.grad_norm for step in kept]).tolist()
        elapsed = time.monotonic() - self._clock
        self.training_seconds += elapsed
        self._clock += elapsed
        speed = self._samples_per_step * len(kept) / elapsed
        for step, loss in zip(kept, losses, strict=True):
            if not math.isfinite(loss):
                raise StageError(
                    f"the loss of step {step.number} is {loss}. Lower learning_rate ({step.lr:g}), lengthen "
                    "lr_warmup_steps, or set mixed_precision to bf16 or no; the checkpoints written before that step are sound"
                )
        rows = [
            StepMetrics(step.number, loss, step.lr, norm if math.isfinite(norm) else None, speed)
            for step, loss, norm in zip(kept, losses, norms, strict=True)
        ]
        if self._metrics is not None and self._trackers is not None:
            self._metrics.append(rows)
            self._trackers.log(rows)
        self._show(rows)

    def _show(self, rows: list[StepMetrics]) -> None:
        last, speed = rows[-1], rows[-1].samples_per_second
        shown = {
            "loss": sum(row.loss for row in rows) / len(rows),
            "lr": last.lr,
            "samples_per_second": speed,
            "eta_seconds": (self._total_steps - last.step) * self._samples_per_step / speed,
        }
        if last.grad_norm is not None:
            shown["grad_norm"] = last.grad_norm
        self._reporter.metric(last.step, shown)
