"""The objective."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.project.settings_model import SettingsModel, Share, none_for_zero


class ObjectiveSettings(SettingsModel):
    """The objective."""

    snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Min-SNR loss weighting (Hang et al. 2023), 5 in the paper; 0 or not set: off."
    )
    caption_dropout_probability: Share = Field(
        0.0, description="Share of samples trained with the empty prompt; size conditioning is kept."
    )
    micro_conditioning: Literal["original", "resized"] = Field(
        "original",
        description="original_size of SDXL's size conditioning: the file's own size, or the size after resizing (SimpleTuner).",
    )

    @field_validator("snr_gamma", mode="before")
    @classmethod
    def _zero_is_not_set(cls, value: Any) -> Any:
        return none_for_zero(value)
