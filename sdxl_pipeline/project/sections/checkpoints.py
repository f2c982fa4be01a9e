"""Checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_pipeline.project.settings_model import Count, SettingsModel


class CheckpointSettings(SettingsModel):
    """Checkpoints."""

    output_dir: str = Field(
        "output", min_length=1, description="Folder for runs, checkpoints and the finished LoRA."
    )
    checkpoint_step_interval: Annotated[int, Field(ge=0)] = Field(
        500, description="Steps between checkpoints; 0 writes only the one at the end."
    )
    checkpoints_total_limit: Count | None = Field(
        None, description="Checkpoints kept; the oldest goes first. Not set: all."
    )
    resume_from_checkpoint: Literal["latest"] | None = Field(
        "latest", description='"latest" continues an unfinished run of the same identity; none starts again.'
    )
