"""Settings of the evaluation."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import Count, SettingsModel, none_for_zero


class EvaluationSettings(SettingsModel):
    """Evaluation."""

    evaluation_type: Annotated[
        Literal["none", "clip"], Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field("none", description="clip also scores the gallery with CLIP.")
    pretrained_evaluation_model_name_or_path: Annotated[
        str, Key(Identity.VALIDATION, path="name or path", overridable=False, used_by=("evaluation",))
    ] = Field(
        "openai/clip-vit-large-patch14",
        min_length=1,
        description="CLIP model of the scores: Hub id, local folder or bundled:tiny-clip.",
    )
    eval_loss_disable: Annotated[bool, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        False, description="Do not compute the eval loss."
    )
    eval_timesteps: Annotated[
        int, Field(ge=1, le=1000), Key(Identity.VALIDATION, used_by=("evaluation",))
    ] = Field(28, description="Number of timesteps that the eval loss is averaged over.")
    num_eval_images: Annotated[Count | None, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        None, description="Maximum images of the eval loss; not set: all."
    )
    eval_dataset_id: Annotated[
        str | None, Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field(None, description="The eval dataset to use; not set: all of them.")
    eval_steps_interval: Annotated[Count | None, Key(Identity.VALIDATION)] = Field(
        None, description="Steps between eval losses during training; not set or 0: none by steps."
    )
    eval_epoch_interval: Annotated[Annotated[float, Field(gt=0)] | None, Key(Identity.VALIDATION)] = Field(
        None,
        description="Epochs between eval losses during training, 0.5 for two per epoch; not set or 0: none by epochs.",
    )
    early_stopping_patience: Annotated[Count | None, Key(Identity.VALUE_IF_SET)] = Field(
        None,
        description="Stop the training after this many eval losses in a row that are not below the lowest one; not set or 0: never.",
    )
    early_stopping_min_delta: Annotated[
        float, Field(ge=0), Key(Identity.VALUE_IF_SET, needs=("early_stopping_patience",))
    ] = Field(0.0, description="How far below the lowest eval loss the next one must be to count as lower.")
    eval_holdout_share: Annotated[float, Field(ge=0, le=0.5), Key(Identity.SAMPLES, overridable=False)] = (
        Field(
            0.1,
            description="Share of each dataset held out for the eval loss if there is no eval dataset: at least 1 image of 8, 2 of 20.",
        )
    )

    @property
    def eval_loss_in_training(self) -> bool:
        """Return whether the eval loss is computed during training."""
        intervals = (self.eval_steps_interval, self.eval_epoch_interval)
        return not self.eval_loss_disable and any(interval is not None for interval in intervals)

    @field_validator("eval_steps_interval", "eval_epoch_interval", "early_stopping_patience", mode="before")
    @classmethod
    def _zero_eval_setting_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)
