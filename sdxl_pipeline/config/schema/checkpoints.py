"""Checkpoints."""

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
"""What makes a folder a checkpoint, beside its tensors."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


class CheckpointSettings(SettingsModel):
    """Checkpoints."""

    output_dir: Annotated[str, Key(Identity.SAVING, path="local", overridable=False)] = Field(
        "output", min_length=1, description="Folder for runs, checkpoints and the finished LoRA."
    )
    checkpoint_step_interval: Annotated[int, Field(ge=0), Key(Identity.SAVING)] = Field(
        500, description="Steps between checkpoints; 0 writes only the one at the end."
    )
    checkpoint_epoch_interval: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None, description="Epochs between checkpoints, beside those by steps. Not set: none by epochs."
    )
    checkpoints_total_limit: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None, description="Checkpoints kept; the oldest goes first. Not set or 0: all."
    )
    checkpointing_rolling_steps: Annotated[Count | None, Key(Identity.SAVING)] = Field(
        None,
        description="Steps between rolling checkpoints, which soon make room for the next. Not set: none.",
    )
    checkpoints_rolling_total_limit: Annotated[Count, Key(Identity.SAVING)] = Field(
        1, description="Rolling checkpoints kept, beside checkpoints_total_limit."
    )
    resume_from_checkpoint: Annotated[str | None, Key(Identity.SAVING, path="checkpoint")] = Field(
        LATEST,
        description='"latest" continues an unfinished run of the same identity, or one that differs in its length alone; the path of a '
        "checkpoint's folder begins there; none starts again. A finished run of the same identity is reused all the same.",
    )
    disk_low_threshold: Annotated[Annotated[int, Field(ge=1)] | None, Key(Identity.SAVING)] = Field(
        None,
        description='Free space, as "100G" or in bytes, below which disk_low_action is taken. Not set: any that holds a checkpoint will do.',
    )
    disk_low_action: Annotated[Literal["stop", "wait"], Key(Identity.SAVING)] = Field(
        "stop", description="stop saves a checkpoint and ends the run; wait holds it until there is space."
    )

    @field_validator(
        "checkpoint_epoch_interval", "checkpointing_rolling_steps", "checkpoints_total_limit", mode="before"
    )
    @classmethod
    def _zero_is_off(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("resume_from_checkpoint", mode="after")
    @classmethod
    def _none_or_latest_in_any_case(cls, value: str | None) -> str | None:
        word = (value or "none").strip().lower()
        return None if word in ("none", "null") else LATEST if word == LATEST else value

    @field_validator("disk_low_threshold", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
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
