"""Settings of automation."""

import re
from typing import Annotated, Final

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import BadValueError, SettingsModel

_CRON: Final = {
    "minute": (0, 59),
    "hour": (0, 23),
    "day of the month": (1, 31),
    "month": (1, 12),
    "day of the week": (0, 7),
}


class AutomationSettings(SettingsModel):
    """Automation."""

    retraining_cron: Annotated[str | None, Key(Identity.REPORTING, overridable=False, published=False)] = (
        Field(
            None,
            pattern=r"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|\S+( +\S+){4})$",
            description='Schedule of retraining, as cron ("0 3 * * 0" is Sundays at 03:00); not set: no schedule.',
        )
    )

    @field_validator("retraining_cron", mode="after")
    @classmethod
    def _validate_cron_ranges(cls, value: str | None) -> str | None:
        fields = value.split() if value else []
        for (name, (least, most)), field in zip(_CRON.items(), fields, strict=False):
            for part in field.split(","):
                for number in re.findall(r"\d+", part.partition("/")[0]):
                    if not least <= int(number) <= most:
                        raise BadValueError(
                            f"has {number} as {name}, which must be {least} to {most}",
                            'write minute, hour, day of the month, month and day of the week, such as "0 3 * * 0"',
                        )
        return value
