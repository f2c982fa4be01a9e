"""Step metrics: collected on the device, fetched every few steps, then written, reported and checked for non-finite values."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler, SampleRef
from sdxl_pipeline.training.logging.observers import RunObserver
from sdxl_pipeline.training.logging.run_logs import RunLog, StepMetrics
from sdxl_pipeline.training.optim.non_finite import SkippedSteps
from sdxl_pipeline.training.validation.validation_runner import Validator


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, taken or skipped, with its metrics still on the device."""

    number: int  # 1 for the first
    losses: Tensor  # (accumulation,), of this process; the loss of the step is their sum, averaged over the processes
    grad_norm: Tensor  # (), over all processes, before clipping
    lr: float
    images: int  # of all processes
    scalars: Mapping[str, float] = field(default_factory=dict)  # further metrics, known on the host


class StepLog:
    """Collects steps on the device until `report`, the only time when the training waits for the device.

    Each process has one; `metrics`, `observer` and `validator` exist on the main process only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reporter: Reporter,
        sampler: BucketBatchSampler,
        total_steps: int,
        training_seconds: float,
        metrics: RunLog[StepMetrics] | None,
        observer: RunObserver | None,
        validator: Validator | None = None,
    ) -> None:
        self._accelerator, self._reporter = accelerator, reporter
        self._sampler, self._total_steps = sampler, total_steps
        self._metrics, self._observer, self._validator = metrics, observer, validator
        self._pending: list[StepRecord] = []
        self._skipped = SkippedSteps(total_steps)
        self.training_seconds = training_seconds
        """Seconds spent in optimizer steps, by all sessions."""
        self.restart_clock()

    def add(self, step: StepRecord) -> None:
        """Keep a step for the next report."""
        self._pending.append(step)

    def restart_clock(self) -> None:
        """Exclude the time since the last report, which was not spent in steps."""
        self._clock = time.monotonic()

    def report(self) -> None:
        """Fetch the pending steps; write and report those taken, and log those skipped with their batches.

        Raise UserError when too many in a row were skipped.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        losses: list[float] = self._accelerator.reduce(
            torch.stack([step.losses.sum() for step in steps]), reduction="mean"
        ).tolist()
        norms: list[float] = torch.stack([step.grad_norm for step in steps]).tolist()
        elapsed = time.monotonic() - self._clock
        self.training_seconds += elapsed
        self._clock += elapsed
        steps_per_second = len(steps) / elapsed
        rows = [
            StepMetrics(
                step.number,
                loss,
                step.lr,
                norm if math.isfinite(norm) else None,
                samples_per_second=steps_per_second * step.images,
                steps_per_second=steps_per_second,
                eta_seconds=(self._total_steps - step.number) / steps_per_second
                + self._validation_seconds(step.number),
                scalars=step.scalars,
            )
            for step, loss, norm in zip(steps, losses, norms, strict=True)
        ]
        applied = [row for row in rows if self._was_taken(row)]
        if self._metrics is not None:
            self._metrics.append(applied)
        if self._observer is not None:
            self._observer.on_steps(applied)
        if applied:
            mean_loss = sum(row.loss for row in applied) / len(applied)
            self._reporter.metric(applied[-1].step, applied[-1].metrics | {"loss": mean_loss})
        self._count_skipped(steps, rows)

    def _validation_seconds(self, step: int) -> float:
        return 0.0 if self._validator is None else self._validator.remaining_seconds(step)

    def _was_taken(self, row: StepMetrics) -> bool:
        """Return whether the step updated the weights, or was skipped by loss scaling as intended (until its scale falls below 1)."""
        if row.grad_norm is not None or not math.isfinite(row.loss):
            return math.isfinite(row.loss)
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def _count_skipped(self, steps: list[StepRecord], rows: list[StepMetrics]) -> None:
        if all(map(self._was_taken, rows)):
            self._skipped.applied()
            return
        # (processes, steps, accumulation); a collective: all processes reach it together because losses and norms are shared
        finite = self._accelerator.gather(torch.stack([step.losses.isfinite() for step in steps])[None]).cpu()
        for index, (step, row) in enumerate(zip(steps, rows, strict=True)):
            if self._was_taken(row):
                self._skipped.applied()
            else:
                suspects = self._suspect_batches(step, finite[:, index])
                self._reporter.log(self._skipped.skipped(step.number, row.loss, suspects))

    def _suspect_batches(self, step: StepRecord, finite: Tensor) -> Iterator[list[SampleRef]]:
        """Yield the batches of a step whose loss is not finite, or all if every loss is finite; `finite` is (processes, accumulation)."""
        processes, accumulation = finite.shape
        for micro_step in range(accumulation):
            for rank in range(processes):
                if finite.all() or not finite[rank, micro_step]:
                    yield self._sampler.batch((step.number - 1) * accumulation + micro_step, rank)
