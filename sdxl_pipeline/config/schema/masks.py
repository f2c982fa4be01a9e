"""Masked loss and prior preservation."""

from typing import Annotated

from pydantic import Field

from sdxl_pipeline.config.schema.settings_model import SettingsModel, Share


class MaskSettings(SettingsModel):
    """Masked loss and prior preservation."""

    masked_loss_probability: Share = Field(
        1.0,
        description="Share of the appearances of masked images whose loss is masked; the others are trained whole.",
    )
    prior_loss_weight: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Weight of the loss of images with is_regularisation_data, beside 1 of all others (Ruiz et al. 2023).",
    )
