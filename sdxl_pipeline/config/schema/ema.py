"""Averaged weights."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import Count, SettingsModel


class EmaSettings(SettingsModel):
    """Averaged weights (EMA)."""

    use_ema: bool = Field(
        False, description="Keep an exponential moving average of the trained weights beside them."
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1), Key(needs=("use_ema",))] = Field(
        0.995, description="Share of the average that an update keeps, once the run is long enough."
    )
    ema_update_interval: Annotated[Count, Key(needs=("use_ema",))] = Field(
        1, description="Optimizer steps between two updates."
    )
    ema_warmup_steps: Annotated[int, Field(ge=0), Key(needs=("use_ema",))] = Field(
        0,
        description="Steps over which the average is a copy of the weights; 0 lets the decay grow as (1 + n) / (10 + n).",
    )
    ema_device: Annotated[Literal["accelerator", "cpu"], Key(Identity.COMPUTE, needs=("use_ema",))] = Field(
        "accelerator", description="Where the average lies; an update on the cpu waits for the device."
    )
    ema_validation: Annotated[
        Literal["none", "ema_only", "comparison"], Key(Identity.VALIDATION, needs=("use_ema",))
    ] = Field("comparison", description="Validation images of the weights, of their average, or of both.")
    released_weights: Annotated[
        Literal["ema", "trained"], Key(Identity.SAVING, needs=("use_ema",), used_by=("lora",))
    ] = Field("ema", description="With use_ema: which of the two are evaluated and published.")
