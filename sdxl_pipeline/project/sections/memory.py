"""Speed and memory; a hardware profile may set these."""

from typing import Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.project.hardware import BaseModelPrecision
from sdxl_pipeline.project.settings_model import BadValueError, Count, SettingsModel, none_for_zero

_INFERENCE = (
    "takes the activations in few bits too, as torchao does for inference: no gradient comes back through it"
)
_KERNELS = "needs kernels for one kind of GPU (mslk), through which no gradient has been seen to come back"
_REFUSED_PRECISIONS = {
    "int8dq-torchao": _INFERENCE,
    "int8dq-int4-torchao": _INFERENCE,
    "fp8-torchao": _INFERENCE,
    "int4-torchao": _KERNELS,
    "fp8-int4-torchao": _KERNELS,
    "fp8-native": "is SimpleTuner's own format",
    "fp8-transformerengine": "needs NVIDIA's Transformer Engine, which this project does not use",
}


class MemorySettings(SettingsModel):
    """Speed and memory; a hardware profile may set these."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="Precision of the UNet's passes."
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass: less memory, slower."
    )
    attention_mechanism: Literal["diffusers"] | None = Field(
        None, description="Attention kernel: diffusers is PyTorch's scaled_dot_product_attention."
    )
    gradient_checkpointing_interval: Count | None = Field(
        None,
        description="With gradient_checkpointing: recompute only every n-th layer; more memory, faster. 0 or 1: every layer.",
    )
    base_model_precision: BaseModelPrecision | None = Field(
        None,
        description="Weights of the frozen UNet in fewer bits; all but no_change need the extra `quantization`.",
    )
    text_encoder_1_precision: BaseModelPrecision | None = Field(
        None, description="The same of the first text encoder, while captions are embedded."
    )
    text_encoder_2_precision: BaseModelPrecision | None = Field(
        None, description="The same of the second text encoder."
    )
    vae_dtype: Literal["bf16", "fp32"] | None = Field(None, description="Precision of VAE encoding.")
    vae_batch_size: Count | None = Field(None, description="Pictures per VAE forward pass.")
    text_encoder_batch_size: Count | None = Field(None, description="Captions per text-encoder forward pass.")

    @field_validator("gradient_checkpointing_interval", mode="before")
    @classmethod
    def _no_interval(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator(
        "base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision", mode="before"
    )
    @classmethod
    def _precision_can_be_trained_through(cls, value: Any) -> Any:
        if isinstance(value, str) and (reason := _REFUSED_PRECISIONS.get(value)):
            raise BadValueError(
                f"{value} {reason}", "write int8-quanto, int8-torchao, fp8wo-torchao or nf4-bnb"
            )
        return value

    @field_validator("vae_dtype", mode="before")
    @classmethod
    def _default_vae_dtype(cls, value: Any) -> Any:
        return None if value == "default" else value
