"""The events of a run, sent to its page (the reporter), the trackers and the webhooks."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.tracking import TrackingSettings
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EarlyStop, TrainedLora, ValidationImage
from sdxl_pipeline.runtime.stage_runner import StageStopped, UserError
from sdxl_pipeline.runtime.webhook import (
    PREVIEW,
    PROGRESS,
    Image,
    Level,
    Message,
    Origin,
    Webhooks,
    load_webhooks,
)
from sdxl_pipeline.training.logging.run_logs import StepMetrics
from sdxl_pipeline.training.logging.tracker_logging import Trackers
from sdxl_pipeline.training.validation.previews import Preview

PREVIEW_SECONDS = 2.0
"""Minimum time between two previews of one image in the reporter; trackers and webhooks get all of them."""


class RunObserver:
    """Sends events to the reporter, the trackers and the webhooks. For the main process only.

    Use it as a context manager around setup and training: on exit it sends the error that ended the run and closes trackers and webhooks.
    Raises UserError for webhooks that cannot be used.
    """

    def __init__(
        self, settings: TrackingSettings, origin: Origin, trackers: Trackers, reporter: Reporter
    ) -> None:
        self._trackers, self._reporter = trackers, reporter
        self._progress_interval = settings.webhook_reporting_interval
        self._step: int | None = None  # until the training begins
        self._total_steps = 0
        self._last_preview: tuple[str, int, float] | None = (
            None  # name, step and time of the last one reported
        )
        config = settings.webhook_config
        try:
            webhooks = load_webhooks(Path(config) if config else None)
        except ProjectError as error:
            raise UserError(str(error)) from error
        self._webhooks = Webhooks(webhooks, origin, reporter.log)

    def __enter__(self) -> "RunObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StageStopped):
            self._send("training.stopped", "The training was stopped; the next run resumes it.", "warning")
        elif error is not None:
            # Only the messages of UserError are known to contain nothing private.
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            self._send("training.failed", f"The training failed: {reason}", "error")
        try:
            self._trackers.close()
        finally:
            self._webhooks.close()

    def on_train_begin(self, resumed_at: int, total_steps: int) -> None:
        """Start the trackers and announce the training. Raise UserError for a tracker that fails to start."""
        self._trackers.start(resumed_at)
        self._step, self._total_steps = resumed_at, total_steps
        begins = "starts" if resumed_at == 0 else f"resumes from step {resumed_at}"
        self._send("training.started", f"The training {begins}: {total_steps} steps.")

    def on_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Log completed steps to the trackers and every `webhook_reporting_interval` to the webhooks; `StepLog` reports a summary."""
        self._trackers.log_steps(rows)
        for row in rows:
            self._step = row.step
            if self._progress_interval and row.step % self._progress_interval == 0:
                text = f"step {row.step} of {self._total_steps}: loss {row.loss:.4f}, lr {row.lr:.3g}"
                message = Message(PROGRESS, text, "info", row.step, row.metrics, human_readable=False)
                self._webhooks.send(message)

    def on_eval_loss(self, step: int, loss: LossSummary, probe: LossSummary | None) -> None:
        """Send the eval loss after a step, and that of the training images in the probe."""
        self._step = step
        metrics = {"eval/loss": loss.mean} | ({} if probe is None else {"eval/train_probe": probe.mean})
        self._trackers.log_metrics(step, metrics)
        self._reporter.metric(step, metrics)
        self._reporter.log(f"Eval loss after step {step}: {loss.mean:.5f}.")
        text = f"step {step} of {self._total_steps}: eval loss {loss.mean:.5f}"
        self._send("eval.loss", text, metrics=metrics)

    def on_early_stop(self, stop: EarlyStop, planned_steps: int) -> None:
        """Announce that early stopping ends the run."""
        self._step = stop.step
        metrics = {"eval/best_loss": stop.best_loss, "eval/best_step": float(stop.best_step)}
        self._trackers.log_metrics(stop.step, metrics)
        text = (
            f"Early stopping ends the training at step {stop.step} of {planned_steps}: none of the last {stop.patience} eval losses is better "
            f"than {stop.best_loss:.5f} at step {stop.best_step}."
        )
        self._reporter.log(text)
        self._send("training.stopped_early", text, metrics=metrics)

    def on_image(self, image: ValidationImage) -> None:
        """Report one finished validation image; `on_images` sends those of a step together."""
        self._reporter.image(image.name, image.path, image.prompt, image.step)

    def on_images(self, images: Sequence[ValidationImage]) -> None:
        """Send all validation images of a step to the trackers and webhooks."""
        self._trackers.log_images(images)
        if not images:
            return
        self._step = images[0].step
        names = ", ".join(image.name for image in images)
        self._send(
            "validation.images",
            f"step {self._step} of {self._total_steps}: {names}",
            paths=[image.path for image in images],
        )

    def on_preview(self, preview: Preview) -> None:
        """Send a preview of an unfinished validation image."""
        self._step = preview.step
        now, last = time.monotonic(), self._last_preview
        if last is None or last[:2] != (preview.name, preview.step) or now - last[2] >= PREVIEW_SECONDS:
            self._last_preview = preview.name, preview.step, now
            self._reporter.image(f"{preview.name} (preview)", preview.path, preview.caption, preview.step)
        self._trackers.log_preview(preview)
        text = f"step {preview.step} of {self._total_steps}: {preview.name}: {preview.caption}"
        self._send(PREVIEW, text, paths=[preview.path], replaces=preview.name)

    def on_train_end(self, manifest: TrainedLora) -> None:
        """Announce the finished run, after its files are written."""
        self._step = manifest.steps
        self._send(
            "training.finished",
            f"The training is finished: {manifest.steps} steps in {manifest.seconds:.0f} s, final loss {manifest.final_loss:.4f}.",
            metrics={"final_loss": manifest.final_loss, "seconds": manifest.seconds},
            paths=[manifest.loss_curve_path],
        )

    def _send(
        self,
        kind: str,
        text: str,
        level: Level = "info",
        metrics: Mapping[str, float] | None = None,
        paths: Sequence[str] = (),
        replaces: str | None = None,
    ) -> None:
        if not len(self._webhooks):
            return  # before reading the images
        images = tuple(Image.read(path) for path in paths)
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}  # as JSON
        message = Message(kind, text, level, self._step, finite, images, replaces=replaces)
        self._webhooks.send(message)
