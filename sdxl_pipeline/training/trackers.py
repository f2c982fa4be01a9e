"""Sends figures and pictures to tensorboard, wandb and trackio, when the settings ask for them."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import TrainSpec, ValidationImage
from sdxl_pipeline.training.identity import numeric_settings
from sdxl_pipeline.training.metrics import StepMetrics
from sdxl_pipeline.training.previews import Preview


class Trackers:
    """The trackers of `report_to`, whose packages are there (`require_tracker`).

    Make one on the main process only, after accelerate's state.

    tensorboard writes under `logging_dir`, which is relative to the run's folder; wandb and trackio obey their own environment
    (WANDB_MODE=offline needs no network, trackio keeps its figures under TRACKIO_DIR). All continue the run they had when training
    is resumed.
    """

    def __init__(self, spec: TrainSpec, identity: str, resumed_at: int) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in spec.settings.report_to:
            tracker = _build(name, spec, identity, resumed_at)
            tracker.start()
            self._trackers.append(tracker)

    def log(self, rows: Sequence[StepMetrics]) -> None:
        """Log the figures of some steps."""
        for row in rows:
            self.log_figures(row.step, {f"train/{name}": value for name, value in row.figures.items()})

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log any figures at a step, by their full names such as "eval/loss"."""
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def log_images(self, images: Sequence[ValidationImage]) -> None:
        """Log validation pictures under their prompts' names."""
        for image in images:
            self._log_picture(f"validation/{image.name}", image.path, image.step)

    def log_preview(self, preview: Preview) -> None:
        """Log a picture that is forming. Those of one training step go under a name each, by their sampler steps."""
        number = f"{preview.sampler_step:0{len(str(preview.sampler_steps))}d}"
        self._log_picture(f"preview/{preview.name}/{number}", preview.path, preview.step)

    def close(self) -> None:
        """Flush and end."""
        for tracker in self._trackers:
            tracker.finish()
            if tracker.name == "wandb":
                import wandb

                wandb.teardown()  # its service would be ended with this program's other children, and complain

    def _log_picture(self, name: str, path: str, step: int) -> None:
        if not self._trackers:
            return
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")  # (1, H, W, 3)
            elif tracker.name == "wandb":
                tracker.log_images({name: pixels[None]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)


def _build(name: str, spec: TrainSpec, identity: str, resumed_at: int) -> GeneralTracker:
    settings = spec.settings
    project, run_name = settings.tracker_project_name or spec.project, settings.tracker_run_name
    config = numeric_settings(settings)  # no places on this disk, no addresses
    # tensorboard and trackio know runs by their names alone
    unique = f"{run_name}-{identity[:12]}" if run_name else identity[:12]
    if name == "tensorboard":
        folder = Path(spec.run_dir) / settings.logging_dir
        # purge_step hides what the interrupted session logged past the checkpoint
        return TensorBoardTracker(unique, str(folder), purge_step=resumed_at + 1)
    if name == "wandb":
        options: dict[str, Any] = {"id": identity[:32], "resume": "allow", "dir": spec.run_dir}
        return WandBTracker(project, name=run_name or identity[:12], config=config, **options)
    return TrackioTracker(project, name=unique, resume="allow", embed=False, config=config)


def require_tracker(name: str) -> None:
    """Raise StageError when the package of a tracker is not installed."""
    if importlib.util.find_spec(name) is None:
        raise StageError(
            f"config.json: report_to asks for {name}, which is not installed; install the extra with "
            f"`pip install 'sdxl-pipeline[{name}]'`, or take {name} out of report_to"
        )
