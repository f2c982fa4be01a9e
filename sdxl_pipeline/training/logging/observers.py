"""What a run tells those who watch it: its page, the trackers and the webhooks."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import LossSummary, TrainedLora, TrainSpec, ValidationImage
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
from sdxl_pipeline.training.logging.metrics_log import StepMetrics
from sdxl_pipeline.training.logging.tracker_logging import Trackers
from sdxl_pipeline.training.validation.previews import Preview

PREVIEW_SECONDS = 2.0
"""Between two previews of an image on the run's page and in its log; trackers and webhooks get them all."""


class RunObserver:
    """Tells everyone. Make one on the main process only.

    As a context manager around all that may fail it tells what ends the run early, and closes the trackers and the webhooks. Raises
    UserError for trackers and webhooks that cannot be used.
    """

    def __init__(self, spec: TrainSpec, identity: str, reporter: Reporter) -> None:
        self._spec, self._reporter = spec, reporter
        self._step: int | None = None  # until it begins
        self._total_steps = 0
        self._previewed: tuple[str, int, float] | None = None  # image, step and time last shown on the page
        config = spec.settings.webhook_config
        try:
            webhooks = load_webhooks(Path(config) if config else None)
        except ProjectError as error:
            raise UserError(str(error)) from error
        self._trackers = Trackers(spec, identity)
        self._webhooks = Webhooks(webhooks, Origin(spec.project, identity[:12]), reporter.log)

    def __enter__(self) -> "RunObserver":
        return self

    def begin(self, resumed_at: int, total_steps: int) -> None:
        """All is loaded, and the first step comes next. Raises UserError for a tracker that does not begin."""
        self._trackers.start(resumed_at)
        self._step, self._total_steps = resumed_at, total_steps
        begins = "starts" if resumed_at == 0 else f"goes on from step {resumed_at}"
        self._send("training.started", f"The training {begins}: {total_steps} steps.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StageStopped):
            self._send("training.stopped", "The training was stopped; the next run goes on.", "warning")
        elif error is not None:
            # Only the words of an error that was made for users are known to hold nothing private.
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            self._send("training.failed", f"The training failed: {reason}", "error")
        try:
            self._trackers.close()
        finally:
            self._webhooks.close()

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Steps were taken. The reporter hears of them from the step log, which thins them."""
        self._trackers.log(rows)
        interval = self._spec.settings.webhook_reporting_interval
        for row in rows:
            self._step = row.step
            if interval and row.step % interval == 0:
                text = f"step {row.step} of {self._total_steps}: loss {row.loss:.4f}, lr {row.lr:.3g}"
                message = Message(PROGRESS, text, "info", row.step, row.figures, for_people=False)
                self._webhooks.send(message)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Anything else there is to plot, by its full name such as "train/ema_decay"."""
        self._trackers.log_figures(step, figures)
        self._reporter.metric(step, figures)

    def eval_loss(self, step: int, loss: LossSummary) -> None:
        """The eval loss was taken."""
        self._step = step
        self.figures(step, {"eval/loss": loss.mean})
        self._reporter.log(f"Eval loss after step {step}: {loss.mean:.5f}.")
        text = f"step {step} of {self._total_steps}: eval loss {loss.mean:.5f}"
        self._send("eval.loss", text, figures={"eval/loss": loss.mean})

    def image(self, image: ValidationImage) -> None:
        """A validation image is finished; those of a step follow together in `images`."""
        self._reporter.image(image.name, image.path, image.prompt, image.step)

    def images(self, images: Sequence[ValidationImage]) -> None:
        """All validation images of a step are drawn."""
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

    def preview(self, preview: Preview) -> None:
        """A validation image is forming."""
        self._step = preview.step
        now, last = time.monotonic(), self._previewed
        if last is None or last[:2] != (preview.name, preview.step) or now - last[2] >= PREVIEW_SECONDS:
            self._previewed = preview.name, preview.step, now
            self._reporter.image(f"{preview.name}, forming", preview.path, preview.caption, preview.step)
        self._trackers.log_preview(preview)
        text = f"step {preview.step} of {self._total_steps}: {preview.name}: {preview.caption}"
        self._send(PREVIEW, text, paths=[preview.path], replaces=preview.name)

    def finished(self, manifest: TrainedLora) -> None:
        """The run is at its end, its files are written."""
        self._step = manifest.steps
        self._send(
            "training.finished",
            f"The training is finished: {manifest.steps} steps in {manifest.seconds:.0f} s, final loss {manifest.final_loss:.4f}.",
            figures={"final_loss": manifest.final_loss, "seconds": manifest.seconds},
            paths=[manifest.loss_curve_path],
        )

    def _send(
        self,
        kind: str,
        text: str,
        level: Level = "info",
        figures: dict[str, float] | None = None,
        paths: Sequence[str] = (),
        replaces: str | None = None,
    ) -> None:
        if not len(self._webhooks):
            return  # and read no images
        images = tuple(Image.read(path) for path in paths)
        message = Message(kind, text, level, self._step, figures or {}, images, replaces=replaces)
        self._webhooks.send(message)
