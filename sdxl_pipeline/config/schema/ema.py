"""Averaged weights."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_pipeline.config.schema.settings_model import Count, SettingsModel


class EmaSettings(SettingsModel):
    """Averaged weights (EMA)."""

    use_ema: bool = Field(
        False, description="Keep an exponential moving average of the trained weights beside them."
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.995, description="Share of the average that an update keeps, once the run is long enough."
    )
    ema_update_interval: Count = Field(1, description="Optimizer steps between two updates.")
    ema_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Steps over which the average is a copy of the weights; 0 lets the decay grow as (1 + n) / (10 + n).",
    )
    ema_device: Literal["accelerator", "cpu"] = Field(
        "accelerator", description="Where the average lies; an update on the cpu waits for the device."
    )
    ema_validation: Literal["none", "ema_only", "comparison"] = Field(
        "comparison", description="Validation images of the weights, of their average, or of both."
    )
    released_weights: Literal["ema", "trained"] = Field(
        "ema", description="With use_ema: which of the two are evaluated and published."
    )
