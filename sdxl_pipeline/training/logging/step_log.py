"""What the steps of a training come to: fetched from the device now and then, written, shown and checked."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.logging.metrics_log import MetricsLog, StepMetrics
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.optim.non_finite import SkippedSteps
from sdxl_pipeline.training.validation.validation_runner import Validator


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, taken or skipped, as the device knows it."""

    number: int  # 1 for the first
    losses: Tensor  # (accumulation,), of this process; the loss of the step is their sum, averaged over the processes
    grad_norm: Tensor  # (), of all processes together, before clipping
    lr: float
    images: int  # of all processes
    scalars: Mapping[str, float] = field(default_factory=dict)  # to be logged as they are, known to the host


class StepLog:
    """Keeps steps on the device until `report`, the only moment when the training waits for it.

    Each process has one; `metrics`, `watch` and `validator` are the main process's alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reporter: Reporter,
        order: BucketBatchSampler,
        total_steps: int,
        training_seconds: float,
        metrics: MetricsLog | None,
        watch: RunObserver | None,
        validator: Validator | None = None,
    ) -> None:
        self._accelerator, self._reporter = accelerator, reporter
        self._order, self._total_steps = order, total_steps
        self._metrics, self._watch, self._looks = metrics, watch, validator
        self._kept: list[StepRecord] = []
        self._skipped = SkippedSteps(total_steps)
        self.training_seconds = training_seconds
        """Spent in optimizer steps, by all sessions."""
        self.restart_clock()

    def add(self, step: StepRecord) -> None:
        """Keep a step for the next report."""
        self._kept.append(step)

    def restart_clock(self) -> None:
        """Leave out the time since the last report: it went into something else than steps."""
        self._clock = time.monotonic()

    def report(self) -> None:
        """Fetch the steps kept since the last report; write and show those taken, and name those skipped.

        Raises UserError when too many were skipped in a row.
        """
        if not self._kept:
            return
        kept, self._kept = self._kept, []
        losses: list[float] = self._accelerator.reduce(
            torch.stack([step.losses.sum() for step in kept]), reduction="mean"
        ).tolist()
        norms: list[float] = torch.stack([step.grad_norm for step in kept]).tolist()
        elapsed = time.monotonic() - self._clock
        self.training_seconds += elapsed
        self._clock += elapsed
        speed = len(kept) / elapsed  # in steps
        rows = [
            StepMetrics(
                step.number,
                loss,
                step.lr,
                norm if math.isfinite(norm) else None,
                samples_per_second=speed * step.images,
                steps_per_second=speed,
                eta_seconds=(self._total_steps - step.number) / speed + self._looking(step.number),
                scalars=step.scalars,
            )
            for step, loss, norm in zip(kept, losses, norms, strict=True)
        ]
        taken = [row for row in rows if self._was_taken(row)]
        if self._metrics is not None:
            self._metrics.append(taken)
        if self._watch is not None:
            self._watch.steps(taken)
        if taken:
            self._show(taken)
        self._count_skipped(kept, rows)

    def _looking(self, step: int) -> float:
        return 0.0 if self._looks is None else self._looks.seconds_to_come(step)

    def _was_taken(self, row: StepMetrics) -> bool:
        """Whether loss and gradients were finite; gradients that overflow under loss scaling belong to it until its scale has gone below 1."""
        if row.grad_norm is not None or not math.isfinite(row.loss):
            return math.isfinite(row.loss)
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def _count_skipped(self, kept: list[StepRecord], rows: list[StepMetrics]) -> None:
        if all(map(self._was_taken, rows)):
            self._skipped.taken()
            return
        # (processes, steps, accumulation); every process comes here together, since they share their losses and norms
        finite = self._accelerator.gather(torch.stack([step.losses.isfinite() for step in kept])[None]).cpu()
        for index, (step, row) in enumerate(zip(kept, rows, strict=True)):
            if self._was_taken(row):
                self._skipped.taken()
            else:
                self._reporter.log(
                    self._skipped.skipped(step.number, row.loss, self._suspects(step, finite[:, index]))
                )

    def _suspects(self, step: StepRecord, finite: Tensor) -> Iterator[list[SampleRef]]:
        """The batches of a step whose loss was not finite, or all of them; `finite` is (processes, accumulation)."""
        processes, accumulation = finite.shape
        for part in range(accumulation):
            for rank in range(processes):
                if finite.all() or not finite[rank, part]:
                    yield self._order.batch((step.number - 1) * accumulation + part, rank)

    def _show(self, rows: list[StepMetrics]) -> None:
        last = rows[-1]
        mean_loss = sum(row.loss for row in rows) / len(rows)
        self._reporter.metric(last.step, last.figures | {"loss": mean_loss})
