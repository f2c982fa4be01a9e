"""Sends figures and images to tensorboard, wandb and trackio, when the settings ask for them."""

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
from sdxl_pipeline.runtime.specs import TrainSpec, ValidationImage
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from sdxl_pipeline.training.logging.metrics_log import StepMetrics
from sdxl_pipeline.training.validation.previews import Preview

KEY_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN")
"""Environment variables that hold the trackers' keys."""


class Trackers:
    """The trackers of `report_to`. Make one on the main process only; raises UserError for one that cannot be used.

    tensorboard writes under `logging_dir`: the graph gives an absolute one, a relative one is seen from the run's folder. wandb and
    trackio obey their own environment (WANDB_MODE=offline needs no network, trackio keeps its figures under TRACKIO_DIR). All continue
    the run they had when training is resumed.
    """

    def __init__(self, spec: TrainSpec, identity: str) -> None:
        self._spec, self._identity = spec, identity
        self._trackers: list[GeneralTracker] = []
        for name in spec.settings.report_to:
            require_tracker(name)

    def start(self, resumed_at: int) -> None:
        """Begin, after accelerate's state is there; until then nothing is logged. Raises UserError for a tracker that will not."""
        for name in self._spec.settings.report_to:
            with _told(name):
                tracker = _build(name, self._spec, self._identity, resumed_at)
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
        """Log validation images under their prompts' names."""
        for image in images:
            self._log_image(f"validation/{image.name}", image.path, image.step)

    def log_preview(self, preview: Preview) -> None:
        """Log an image that is forming. Those of one training step go under a name each, by their sampler steps."""
        number = f"{preview.sampler_step:0{len(str(preview.sampler_steps))}d}"
        self._log_image(f"preview/{preview.name}/{number}", preview.path, preview.step)

    def close(self) -> None:
        """Flush and end."""
        for tracker in self._trackers:
            tracker.finish()
        if "wandb" in self._spec.settings.report_to:
            import wandb

            wandb.teardown()  # its service would be ended with this program's other children, and complain

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


def _build(name: str, spec: TrainSpec, identity: str, resumed_at: int) -> GeneralTracker:
    settings = spec.settings
    project, run_name = settings.tracker_project_name or spec.project, settings.tracker_run_name
    config = settings_affecting_weights(settings)  # no places on this disk, no addresses
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
    """Raise UserError when the package of a tracker is not installed, or wandb has no key."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"config.json: report_to asks for {name}, which is not installed; install the extra with "
            f"`pip install 'sdxl-pipeline[{name}]'`, or take {name} out of report_to"
        )
    if name == "wandb":
        _require_key()


def _require_key() -> None:
    """Without one wandb would fail when it begins, after minutes of loading. Whether the key is good is seen there."""
    import wandb

    with _told("wandb"):
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        usable = offline or wandb.login(prompt=False, verify=False)
    if not usable:
        raise UserError(
            "config.json: report_to asks for wandb, which has no key on this machine; run `wandb login` there, set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to keep the figures in the run's folder"
        )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever a tracker raises becomes a UserError that names it, without the keys it was given."""
    try:
        yield
    except Exception as error:
        words = without_credentials(str(error))
        for variable in KEY_VARIABLES:
            words = words.replace(os.environ.get(variable) or HIDDEN, HIDDEN)
        raise UserError(
            f"config.json: report_to asks for {name}, which cannot be started ({type(error).__name__}: {words}); mend that, or take "
            f"{name} out of report_to"
        ) from error
