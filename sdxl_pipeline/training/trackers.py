"""Sends metrics and pictures to tensorboard and wandb, when the settings ask for them."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import TrainSpec, ValidationImage
from sdxl_pipeline.training.metrics import StepMetrics


class Trackers:
    """The trackers of `report_to`, whose packages are there (`require_tracker`).

    Make one on the main process only, after accelerate's state.

    tensorboard writes under `logging_dir`, which is relative to the run's folder; wandb obeys its own environment (WANDB_MODE=offline
    needs no network). Both continue the run they had when training is resumed.
    """

    def __init__(self, spec: TrainSpec, identity: str, resumed_at: int) -> None:
        settings = spec.settings
        run_name = settings.tracker_run_name or identity[:12]
        self._trackers: list[GeneralTracker] = []
        for name in settings.report_to:
            tracker: GeneralTracker
            if name == "tensorboard":
                folder = Path(spec.run_dir) / settings.logging_dir
                # purge_step hides what the interrupted session logged past the checkpoint
                tracker = TensorBoardTracker(run_name, str(folder), purge_step=resumed_at + 1)
            else:
                tracker = WandBTracker(
                    settings.tracker_project_name or spec.project,
                    name=run_name,
                    id=identity[:32],
                    resume="allow",
                    dir=spec.run_dir,
                )
            tracker.start()
            self._trackers.append(tracker)

    def log(self, rows: Sequence[StepMetrics]) -> None:
        """Log the metrics of some steps."""
        for tracker in self._trackers:
            for row in rows:
                values: dict[str, Any] = {
                    "train/loss": row.loss,
                    "train/lr": row.lr,
                    "train/samples_per_second": row.samples_per_second,
                }
                if row.grad_norm is not None:
                    values["train/grad_norm"] = row.grad_norm
                tracker.log(values, step=row.step)

    def log_images(self, images: Sequence[ValidationImage]) -> None:
        """Log validation pictures under their prompts' names."""
        for tracker in self._trackers:
            for image in images:
                with Image.open(image.path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3)
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"validation/{image.name}": pixels}, step=image.step, **options)

    def close(self) -> None:
        """Flush and end."""
        for tracker in self._trackers:
            tracker.finish()


def require_tracker(name: str) -> None:
    """Raise StageError when the package of a tracker is not installed."""
    if importlib.util.find_spec(name) is None:
        raise StageError(
            f"config.json: report_to asks for {name}, which is not installed; install the extra with "
            f"`pip install 'sdxl-pipeline[{name}]'`, or take {name} out of report_to"
        )
