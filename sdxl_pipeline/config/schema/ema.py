"""Settings of the exponential moving average."""

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
        0.995, description="Decay of the average after its warm-up."
    )
    ema_update_interval: Annotated[Count, Key(needs=("use_ema",))] = Field(
        1, description="Optimizer steps between updates."
    )
    ema_warmup_steps: Annotated[int, Field(ge=0), Key(needs=("use_ema",))] = Field(
        0,
        description="Steps during which the average is a copy of the weights; with 0 the decay grows as (1 + n) / (10 + n) up to ema_decay.",
    )
    ema_device: Annotated[Literal["accelerator", "cpu"], Key(Identity.COMPUTE, needs=("use_ema",))] = Field(
        "accelerator",
        description="Device of the average; an update on the cpu synchronizes with the accelerator.",
    )
    ema_validation: Annotated[
        Literal["none", "ema_only", "comparison"], Key(Identity.VALIDATION, needs=("use_ema",))
    ] = Field("comparison", description="Validation images with the trained weights, their average, or both.")
    released_weights: Annotated[
        Literal["ema", "trained"], Key(Identity.SAVING, needs=("use_ema",), used_by=("lora",))
    ] = Field("ema", description="With use_ema: which weights are evaluated and published.")
