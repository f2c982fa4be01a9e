"""Tracking."""

from typing import Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.project.settings_model import SettingsModel, read_list


class TrackingSettings(SettingsModel):
    """Tracking."""

    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description='Trackers, joined by commas: tensorboard, wandb; "none" for none.'
    )
    tracker_project_name: str | None = Field(
        None, description="Project name in the trackers; not set: the project's name."
    )
    tracker_run_name: str | None = Field(
        None, description="Run name in the trackers; not set: the run's identity."
    )
    logging_dir: str = Field("logs", min_length=1, description="Folder of the tensorboard logs.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _read_trackers(cls, value: Any) -> Any:
        return read_list(value)
