"""The trackers that receive training metrics in addition to metrics.jsonl."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import dagster as dg
from pydantic import Field

from sdxl_pipeline.config.schema.training import TrainingSettings

# Name in `report_to` -> module it needs. Each is an extra of this project by the same name.
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
WANDB_MODES = ("online", "offline", "disabled")


class TrackerResource(dg.ConfigurableResource):
    """The trackers of this deployment. A project's config.json takes precedence; tokens come from the trackers' own environment variables."""

    report_to: list[str] | None = Field(
        default=None,
        description=f"Trackers for projects whose config.json has no report_to: {', '.join(TRACKERS)}.",
    )
    logging_dir: str | None = Field(
        default=None,
        description="Folder of the tensorboard logs for projects whose config.json has no logging_dir.",
    )
    wandb_mode: str | None = Field(
        default=None, description=f"One of {', '.join(WANDB_MODES)}; not set: WANDB_MODE, or wandb's default."
    )

    def apply(self, settings: TrainingSettings) -> TrainingSettings:
        """Return the settings, with this deployment's trackers where the project configures none.

        Raise `dagster.Failure` for a tracker that is unknown or not installed, before a training starts.
        """
        updates: dict[str, Any] = {}
        if self.report_to is not None and "report_to" not in settings.model_fields_set:
            updates["report_to"] = tuple(self.report_to)
        if self.logging_dir is not None and "logging_dir" not in settings.model_fields_set:
            updates["logging_dir"] = self.logging_dir
        _require_installed(updates.get("report_to", settings.report_to))
        return settings.model_copy(update=updates)

    def environment(self) -> dict[str, str]:
        """Return the trackers' environment variables for `LocalStageClient.run_stage(environment=...)`."""
        if self.wandb_mode is None:
            return {}
        if self.wandb_mode not in WANDB_MODES:
            raise dg.Failure(
                f"the resource `trackers` is invalid: wandb_mode is {self.wandb_mode!r}; write one of {', '.join(WANDB_MODES)}",
                allow_retries=False,
            )
        return {"WANDB_MODE": self.wandb_mode}


def _require_installed(names: Sequence[str]) -> None:
    for name in names:
        if name not in TRACKERS:
            raise dg.Failure(
                f"report_to: unknown tracker {name!r}; write {', '.join(TRACKERS)}", allow_retries=False
            )
        if find_spec(TRACKERS[name]) is None:
            raise dg.Failure(
                f"report_to: {name} is not installed; install the extra: pip install 'sdxl-pipeline[{name}]', or remove it from report_to",
                allow_retries=False,
            )
