"""Settings of checkpoints."""

import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import (
    LARGEST,
    BadValueError,
    Count,
    SettingsModel,
    none_for_zero,
)

LATEST: Final = "latest"

CHECKPOINT_STATE: Final = "state.json"
"""File that every checkpoint folder contains beside its tensors."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


class CheckpointSettings(SettingsModel):
    """Checkpoints."""

    output_dir: Annotated[str, Key(Identity.SAVING, path="local", overridable=False)] = Field(
        "output", min_length=1, description="Folder of runs, checkpoints and the trained weights."
    )
    checkpoint_step_interval: Annotated[int, Field(ge=0), Key(Identity.SAVING)] = Field(
        500, description="Steps between checkpoints; 0 writes only the final one."
    )
    checkpoint_epoch_interval: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None,
        description="Epochs between checkpoints, in addition to checkpoint_step_interval. Not set: none by epochs.",
    )
    checkpoints_total_limit: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None, description="Checkpoints retained; the oldest is deleted first. Not set or 0: all."
    )
    checkpointing_rolling_steps: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None,
        description="Steps between rolling checkpoints, which the next ones replace. Not set: none.",
    )
    checkpoints_rolling_total_limit: Annotated[Count, Key(Identity.SAVING)] = Field(
        1, description="Rolling checkpoints retained, in addition to checkpoints_total_limit."
    )
    resume_from_checkpoint: Annotated[str | None, Key(Identity.SAVING, path="checkpoint")] = Field(
        LATEST,
        description='"latest" resumes an unfinished run of the same identity, or one that differs only in its length; the path of a '
        "checkpoint folder resumes from there; none starts at step 0. A finished run of the same identity is reused in any case.",
    )
    disk_low_threshold: Annotated[Annotated[int, Field(ge=1)] | None, Key(Identity.SAVING)] = Field(
        None,
        description='Free space, as "100G" or in bytes, below which disk_low_action is executed. Not set: the size of a checkpoint.',
    )
    disk_low_action: Annotated[Literal["stop", "wait"], Key(Identity.SAVING)] = Field(
        "stop", description="stop saves a checkpoint and ends the run; wait pauses it until there is space."
    )

    @field_validator(
        "checkpoint_epoch_interval", "checkpointing_rolling_steps", "checkpoints_total_limit", mode="before"
    )
    @classmethod
    def _zero_checkpoint_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("resume_from_checkpoint", mode="after")
    @classmethod
    def _normalize_keyword(cls, value: str | None) -> str | None:
        word = (value or "none").strip().lower()
        return None if word in ("none", "null") else LATEST if word == LATEST else value

    @field_validator("disk_low_threshold", mode="before")
    @classmethod
    def _parse_size(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return none_for_zero(value)
        match = _SIZE.fullmatch(value.strip())
        number, unit = match.groups() if match else ("inf", "")
        size = float(number) * 1024 ** "_KMGT".index(unit.upper() or "_")
        if not size < LARGEST:
            raise BadValueError(
                "is not a size", 'write bytes, or a number with K, M, G or T, such as "100G" (1024 each)'
            )
        return none_for_zero(int(size))
