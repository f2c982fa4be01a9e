"""Logging of metrics and images to tensorboard, wandb and trackio."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from sdxl_pipeline.config.credentials import HIDDEN, without_credentials
from sdxl_pipeline.config.schema.tracking import TrackingSettings
from sdxl_pipeline.runtime.specs import ValidationImage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.logging.run_logs import StepMetrics
from sdxl_pipeline.training.validation.previews import Preview

KEY_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN")
"""Environment variables that hold the trackers' API keys."""


class Trackers:
    """The trackers of `report_to`, for the main process only. Raises UserError for one whose package or key is missing.

    `config` is logged as the run's hyperparameters. tensorboard writes under `logging_dir`, which is relative to `run_dir` unless absolute.
    wandb and trackio read their own environment variables (WANDB_MODE=offline needs no network, TRACKIO_DIR stores trackio's data). A
    resumed training continues the same run in each of them.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        project: str,
        identity: str,
        run_dir: Path,
        config: Mapping[str, Any],
    ) -> None:
        self._settings, self._identity = settings, identity
        self._project, self._run_dir, self._config = project, run_dir, config
        self._trackers: list[GeneralTracker] = []
        for name in settings.report_to:
            require_tracker(name)

    def start(self, resumed_at: int) -> None:
        """Start the trackers; requires accelerate's state. Nothing is logged before. Raise UserError for a tracker that fails to start."""
        for name in self._settings.report_to:
            with _start_errors(name):
                tracker = self._build(name, resumed_at)
                tracker.start()
            self._trackers.append(tracker)

    def log_steps(self, rows: Sequence[StepMetrics]) -> None:
        """Log the metrics of some steps."""
        for row in rows:
            self.log_metrics(row.step, {f"train/{name}": value for name, value in row.metrics.items()})

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of a step by their full names, such as "eval/loss"."""
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def log_images(self, images: Sequence[ValidationImage]) -> None:
        """Log validation images as "validation/<name>"."""
        for image in images:
            self._log_image(f"validation/{image.name}", image.path, image.step)

    def log_preview(self, preview: Preview) -> None:
        """Log a preview as "preview/<name>/<sampler step>", so that the previews of one training step do not replace each other."""
        number = f"{preview.sampler_step:0{len(str(preview.sampler_steps))}d}"
        self._log_image(f"preview/{preview.name}/{number}", preview.path, preview.step)

    def close(self) -> None:
        """Flush and finish all trackers."""
        for tracker in self._trackers:
            tracker.finish()
        if "wandb" in self._settings.report_to:
            import wandb

            wandb.teardown()  # its service process would log an error when it is ended with our other child processes

    def _log_image(self, name: str, path: str, step: int) -> None:
        if not self._trackers:
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")  # (1, H, W, 3)
            elif tracker.name == "wandb":
                tracker.log_images({name: pixels[None]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)

    def _build(self, name: str, resumed_at: int) -> GeneralTracker:
        project = self._settings.tracker_project_name or self._project
        run_name = self._settings.tracker_run_name
        # tensorboard and trackio identify a run by its name alone
        unique = f"{run_name}-{self._identity[:12]}" if run_name else self._identity[:12]
        if name == "tensorboard":
            folder = self._run_dir / self._settings.logging_dir
            # purge_step hides what the interrupted session logged after the checkpoint
            return TensorBoardTracker(unique, str(folder), purge_step=resumed_at + 1)
        config = dict(self._config)
        if name == "wandb":
            options = {"id": self._identity[:32], "resume": "allow", "dir": str(self._run_dir)}
            return WandBTracker(project, name=run_name or self._identity[:12], config=config, **options)
        return TrackioTracker(project, name=unique, resume="allow", embed=False, config=config)


def require_tracker(name: str) -> None:
    """Raise UserError when the package of a tracker is not installed, or wandb has no API key."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"config.json: report_to has {name}, which is not installed; install the extra with "
            f"`pip install 'sdxl-pipeline[{name}]'`, or remove {name} from report_to"
        )
    if name == "wandb":
        _require_wandb_key()


def _require_wandb_key() -> None:
    """Raise UserError when wandb has no API key, which it would report only after minutes of loading. Does not check that the key is valid."""
    import wandb

    with _start_errors("wandb"):
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        usable = offline or wandb.login(prompt=False, verify=False)
    if not usable:
        raise UserError(
            "config.json: report_to has wandb, which has no API key on this machine; run `wandb login` there, set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to store the metrics in the run's folder"
        )


@contextmanager
def _start_errors(name: str) -> Iterator[None]:
    """Turn any exception of a tracker into a UserError with its name and without API keys."""
    try:
        yield
    except Exception as error:
        message = without_credentials(str(error))
        for variable in KEY_VARIABLES:
            message = message.replace(os.environ.get(variable) or HIDDEN, HIDDEN)
        raise UserError(
            f"config.json: report_to has {name}, which cannot be started ({type(error).__name__}: {message}); fix that, or remove "
            f"{name} from report_to"
        ) from error
