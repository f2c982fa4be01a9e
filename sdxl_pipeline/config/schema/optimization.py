"""Settings of optimizer, learning rate schedule, gradients and EMA."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import BadValueError, Count, SettingsModel, none_for_zero


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


OptimizerValue = bool | float | str | tuple[float, ...]

OptimizerName = Literal[
    "adamw",
    "torch-adam",
    "torch-adamw",
    "torch-sgd",
    "torch-radam",
    "torch-nadam",
    "torch-rmsprop",
    "torch-adagrad",
    "torch-adadelta",
    "torch-adafactor",
    "torch-adamax",
    "torch-asgd",
    "adamw_bf16",
    "adamw_schedulefree",
    "adamw_schedulefree+aggressive",
    "adamw_schedulefree+no_kahan",
    "optimi-adam",
    "optimi-adamw",
    "optimi-adan",
    "optimi-lion",
    "optimi-radam",
    "optimi-ranger",
    "optimi-sgd",
    "optimi-stableadamw",
    "ao-adamw8bit",
    "ao-adamw4bit",
    "ao-adamfp8",
    "ao-adamwfp8",
    "bnb-adagrad",
    "bnb-adagrad8bit",
    "bnb-adam",
    "bnb-adam8bit",
    "bnb-adamw",
    "bnb-adamw8bit",
    "bnb-adamw-paged",
    "bnb-adamw8bit-paged",
    "bnb-lion",
    "bnb-lion8bit",
    "bnb-lion-paged",
    "bnb-lion8bit-paged",
    "bnb-ademamix",
    "bnb-ademamix8bit",
    "bnb-ademamix-paged",
    "bnb-ademamix8bit-paged",
    "prodigy",
    "adafactor",
]

_REFUSED_OPTIMIZERS = {
    "torch-sparseadam": "supports sparse gradients only, such as those of embeddings; a UNet has dense ones",
}

ScheduleName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
]

BucketFill = Literal["partial", "wrap"]


class OptimizationSettings(SettingsModel):
    """Optimisation."""

    learning_rate: Annotated[float, Field(gt=0, le=10), Key(on_card=True)] = Field(
        1e-4, description="Learning rate after warm-up."
    )
    optimizer: Annotated[OptimizerName, Key(on_card=True)] = Field(
        "adamw",
        description="Optimizer; all but adamw, adafactor and torch's need the extra `optimizers`.",
    )
    optimizer_config: dict[str, OptimizerValue] = Field(
        default_factory=dict,
        description='The optimizer\'s own settings, as "beta1=0.9,weight_decay=0.01" or an object.',
    )
    gradient_precision: Literal["unmodified", "fp32"] = Field(
        "unmodified",
        description="fp32 accumulates the gradients of bf16 weights (adamw_bf16) in fp32; all other weights have fp32 gradients.",
    )
    lr_scheduler: Annotated[ScheduleName, Key(on_card=True, used_by=("training_plan",))] = Field(
        "constant_with_warmup", description="Learning-rate schedule."
    )
    lr_warmup_steps: Annotated[int, Field(ge=0), Key(on_card=True, used_by=("training_plan",))] = Field(
        0,
        description="Steps over which the learning rate rises from 0; for sine, the steps from peak to trough.",
    )
    lr_end: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Learning rate at the end of cosine, cosine_with_restarts and polynomial, and at the troughs of sine; not set: 4e-7 for polynomial and sine, 0 for the others.",
    )
    lr_power: Annotated[float, Field(gt=0)] = Field(
        0.8, description="Exponent of polynomial: 1 is linear, more decreases faster at first."
    )
    lr_num_cycles: Count = Field(1, description="Number of cycles of cosine_with_restarts.")
    lr_scale: bool = Field(
        False, description="Multiply learning_rate by the images per optimizer step, over all processes."
    )
    lr_scale_sqrt: bool = Field(
        False, description="With lr_scale: multiply by the square root of that number."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        2.0, description="Gradient clipping threshold of grad_clip_method; 0 disables clipping."
    )
    grad_clip_method: Literal["norm", "value"] = Field(
        "norm",
        description="norm clips the global norm of the gradients; value clips each element.",
    )
    train_batch_size: Annotated[Count, Key(on_card=True, used_by=("training_plan", "run_evaluation"))] = (
        Field(4, description="Images per device and forward pass (micro-batch).")
    )
    bucket_fill: Annotated[BucketFill, Key(used_by=("training_plan",))] = Field(
        "partial",
        description="Last batch of a bucket: partial leaves it smaller, so an epoch contains every image repeats + 1 times; wrap fills it with images of the same bucket.",
    )
    gradient_accumulation_steps: Annotated[Count, Key(on_card=True, used_by=("training_plan",))] = Field(
        1, description="Forward passes per optimizer step."
    )
    max_train_steps: Annotated[
        Annotated[int, Field(ge=1)] | None, Key(length=True, used_by=("training_plan",))
    ] = Field(None, description="Optimizer steps of the run; 0: num_train_epochs sets the length.")
    num_train_epochs: Annotated[
        Annotated[int, Field(ge=1)] | None, Key(length=True, used_by=("training_plan",))
    ] = Field(
        None, description="Epochs of the run; 0: max_train_steps sets the length; 1 if neither is given."
    )
    seed: Annotated[
        int, Field(ge=0, lt=2**32), Key(on_card=True, used_by=("training_plan", "run_evaluation"))
    ] = Field(42, description="Seed of all random numbers.")

    @field_validator("optimizer", mode="before")
    @classmethod
    def _refuse_sparse_optimizers(cls, value: Any) -> Any:
        if isinstance(value, str) and (reason := _REFUSED_OPTIMIZERS.get(value)):
            raise BadValueError(f"{value} {reason}", 'write "torch-adam" or "adamw"')
        return value

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _normalize_scheduler_name(cls, value: Any) -> Any:
        return {"cosine_with_warmup": "cosine"}.get(value, value) if isinstance(value, str) else value

    @field_validator("max_train_steps", "num_train_epochs", mode="before")
    @classmethod
    def _zero_length_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def _parse_optimizer_config(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_assignments(value)
        if isinstance(value, dict):
            return {key: _scalar(item) if isinstance(item, str) else item for key, item in value.items()}
        return value

    @field_validator("gradient_precision", "lr_num_cycles", mode="before")
    @classmethod
    def _none_to_default(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and value.strip().lower() in ("", "none", "null"):
            return cls.model_fields[info.field_name or ""].default
        return value

    @property
    def is_schedule_free(self) -> bool:
        """Return whether the optimizer is schedule-free: it averages weights instead of decaying the rate (Defazio et al. 2024)."""
        return self.optimizer.startswith("adamw_schedulefree")

    def longest_warmup(self, steps: int) -> int:
        """Return the largest `lr_warmup_steps` for which one of `steps` optimizer steps uses the full `learning_rate`.

        A schedule raises the rate from 0 at step 0, so it is reached at step `lr_warmup_steps`, counted from 0; a schedule-free optimizer
        reaches it one step earlier. `sine` starts at its peak, so it has no limit.
        """
        if self.lr_scheduler == "sine":
            return self.lr_warmup_steps
        return steps if self.is_schedule_free else steps - 1

    @property
    def effective_lr_end(self) -> float:
        """Return `lr_end`, or the default of the schedule."""
        if self.lr_end is not None:
            return self.lr_end
        return 4e-7 if self.lr_scheduler in ("polynomial", "sine") else 0.0

    @model_validator(mode="after")
    def _constant_with_warmup_steps(self) -> Self:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            object.__setattr__(self, "lr_scheduler", "constant_with_warmup")  # as in SimpleTuner
        return self

    @model_validator(mode="after")
    def _default_length(self) -> Self:
        if self.max_train_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "num_train_epochs", 1)  # the model is frozen for everyone else
        return self


def parse_assignments(text: str) -> dict[str, OptimizerValue]:
    """Parse `"beta1=0.9,weight_decay=0.01"` into a dict of typed values. Raise BadValueError for a part without "="."""
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
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise BadValueError(f"holds {text}, which is not a finite number", "write a finite number")
    return number
