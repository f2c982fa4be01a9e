"""Settings of masked loss and prior preservation."""

from typing import Annotated

from pydantic import Field

from sdxl_pipeline.config.schema.settings_model import SettingsModel, Share


class MaskSettings(SettingsModel):
    """Masked loss and prior preservation."""

    masked_loss_probability: Share = Field(
        1.0,
        description="Share of the samples of masked images whose loss is masked; the others use the full image.",
    )
    prior_loss_weight: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Loss weight of images with is_regularisation_data; all others have 1 (Ruiz et al. 2023).",
    )
