"""The adapter."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.project.settings_model import Count, SettingsModel, read_list

ATTENTION_PROJECTIONS: Final = ("to_k", "to_q", "to_v", "to_out.0")
"""Suffixes of the UNet's attention projections."""


class AdapterSettings(SettingsModel):
    """The adapter."""

    lora_type: Literal["standard"] = Field("standard", description="Adapter kind: PEFT's LoRA.")
    lora_rank: Count = Field(16, description="Rank of the update matrices.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Updates are scaled by lora_alpha / lora_rank; not set: equal to lora_rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Probability of dropping an adapter's input."
    )
    lora_target_modules: tuple[str, ...] = Field(
        ATTENTION_PROJECTIONS,
        min_length=1,
        description="Name suffixes of the UNet layers that get an adapter: a list, or names joined by commas.",
    )

    @property
    def effective_lora_alpha(self) -> float:
        """`lora_alpha`, or the rank where it is not set."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _read_target_modules(cls, value: Any) -> Any:
        return read_list(value)
