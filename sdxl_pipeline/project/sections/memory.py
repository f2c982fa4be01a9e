"""Speed and memory; a hardware profile may set these."""

from typing import Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.project.settings_model import Count, SettingsModel


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
    base_model_precision: Literal["no_change", "int8-quanto"] | None = Field(
        None, description="Quantization of the frozen UNet; int8-quanto needs the extra `quantization`."
    )
    vae_dtype: Literal["bf16", "fp32"] | None = Field(None, description="Precision of VAE encoding.")
    vae_batch_size: Count | None = Field(None, description="Pictures per VAE forward pass.")
    text_encoder_batch_size: Count | None = Field(None, description="Captions per text-encoder forward pass.")

    @field_validator("vae_dtype", mode="before")
    @classmethod
    def _default_vae_dtype(cls, value: Any) -> Any:
        return None if value == "default" else value
