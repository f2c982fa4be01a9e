"""Settings of trackers and webhooks."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import (
    BadValueError,
    Count,
    SettingsModel,
    none_for_zero,
    read_list,
)


class TrackingSettings(SettingsModel):
    """Tracking."""

    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Key(Identity.REPORTING)] = (
        Field((), description='Trackers, joined by commas: tensorboard, wandb, trackio; "none" for none.')
    )
    tracker_project_name: Annotated[str | None, Key(Identity.REPORTING)] = Field(
        None, description="Project name in the trackers; not set: the project's name."
    )
    tracker_run_name: Annotated[str | None, Key(Identity.REPORTING)] = Field(
        None, description="Run name in the trackers; not set: the run's identity."
    )
    logging_dir: Annotated[str, Key(Identity.REPORTING, path="local", overridable=False)] = Field(
        "logs", min_length=1, description="Folder of the tensorboard logs."
    )
    webhook_config: Annotated[str | None, Key(Identity.REPORTING, path="local")] = Field(
        None,
        min_length=1,
        description="JSON file with one webhook, or a list of them, for messages and images of the training.",
    )
    webhook_reporting_interval: Annotated[Count | None, Key(Identity.REPORTING)] = Field(
        None,
        description="Steps between the metrics sent to raw webhooks; not set or 0: no metrics. Discord receives none.",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _parse_trackers(cls, value: Any) -> Any:
        return read_list(value)

    @field_validator("webhook_config", mode="before")
    @classmethod
    def _refuse_inline_webhook(cls, value: Any) -> Any:
        text = value.strip() if isinstance(value, str) else ""
        if isinstance(value, dict | list) or text.startswith(("{", "[")) or "://" in text:
            raise BadValueError(
                "is a webhook, not the path of a file: its URL is a secret, which config.json would copy into logs and specs",
                "write it to a separate JSON file, and the path of that file here",
            )
        return value

    @field_validator("webhook_reporting_interval", mode="before")
    @classmethod
    def _zero_webhook_interval_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)
