"""Automation."""

from pydantic import Field

from sdxl_pipeline.project.settings_model import SettingsModel


class AutomationSettings(SettingsModel):
    """Automation."""

    retraining_cron: str | None = Field(
        None,
        pattern=r"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|\S+( +\S+){4})$",
        description='When to train again, as cron ("0 3 * * 0" is Sundays at three); not set: never by itself.',
    )
