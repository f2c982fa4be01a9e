"""Evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from sdxl_pipeline.project.settings_model import Count, SettingsModel


class EvaluationSettings(SettingsModel):
    """Evaluation."""

    evaluation_type: Literal["none", "clip"] = Field(
        "none", description="clip also scores the gallery with CLIP."
    )
    pretrained_evaluation_model_name_or_path: str = Field(
        "openai/clip-vit-large-patch14",
        min_length=1,
        description="CLIP that scores: Hub id, local folder or bundled:tiny-clip.",
    )
    eval_loss_disable: bool = Field(False, description="Leave the eval loss out.")
    eval_timesteps: Annotated[int, Field(ge=1, le=1000)] = Field(
        28, description="Timesteps the eval loss is averaged over."
    )
    num_eval_images: Count | None = Field(
        None, description="Most pictures used for the eval loss; not set: all."
    )
    eval_holdout_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1,
        description="Share of each dataset kept out of training for the eval loss when no eval dataset is given.",
    )
