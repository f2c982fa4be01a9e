"""Optimisation."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sdxl_pipeline.project.settings_model import BadValueError, Count, SettingsModel, none_for_zero

OptimizerValue = bool | float | str


class OptimisationSettings(SettingsModel):
    """Optimisation."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        1e-4, description="Learning rate after warm-up."
    )
    optimizer: Literal["adamw", "optimi-adamw", "optimi-lion", "optimi-stableadamw"] = Field(
        "adamw", description="Optimizer; optimi-* need the extra `optimizers`."
    )
    optimizer_config: dict[str, OptimizerValue] = Field(
        default_factory=dict,
        description='The optimizer\'s own settings, as "beta1=0.9,weight_decay=0.01" or an object.',
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine"] = Field(
        "constant_with_warmup", description="Shape of the learning rate over the run."
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps over which the learning rate rises from 0."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        2.0, description="Gradients are scaled down to this norm; 0 leaves them alone."
    )
    train_batch_size: Count = Field(4, description="Pictures per device and forward pass.")
    gradient_accumulation_steps: Count = Field(1, description="Forward passes per optimizer step.")
    max_train_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Optimizer steps to train; 0 leaves the length to num_train_epochs."
    )
    num_train_epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Passes over the pictures; 0 leaves it to max_train_steps; 1 when neither is given."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of everything random.")

    @field_validator("max_train_steps", "num_train_epochs", mode="before")
    @classmethod
    def _zero_length_is_not_set(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def _read_optimizer_config(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_assignments(value)
        if isinstance(value, dict):
            return {key: _scalar(item) if isinstance(item, str) else item for key, item in value.items()}
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_train_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "num_train_epochs", 1)  # the model is frozen for everyone else
        return self


def parse_assignments(text: str) -> dict[str, OptimizerValue]:
    """`"beta1=0.9,weight_decay=0.01"` as a dict; numbers and booleans are typed. Raises BadValueError for a part without "="."""
    values: dict[str, OptimizerValue] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise BadValueError(
                f"{part!r} is not of the form name=value", 'write for example "beta1=0.9,weight_decay=0.01"'
            )
        if name in values:
            raise BadValueError(f"{name!r} is given twice", "keep one of the two")
        values[name] = _scalar(value)
    return values


def _scalar(text: str) -> OptimizerValue:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
