"""The hardware profile that the stages run on, selected once for the whole graph."""

import os
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware, HardwareError, hardware_from_name

PROFILE_VARIABLE = "SDXL_HARDWARE"
NAMES = ", ".join(["auto", *PRESETS])


class HardwareProfile(dg.ConfigurableResource):
    """A hardware profile by name, with overrides of its values. Keys of a project's config.json take precedence over all of them."""

    profile: str | None = Field(
        default=None,
        description=f"One of {NAMES}. Not set: the environment variable {PROFILE_VARIABLE}, and without it `auto`, which detects the "
        "device and its memory.",
    )
    device: str | None = Field(
        default=None, description="cpu, cuda or mps. ROCm cards are `cuda` to PyTorch."
    )
    num_processes: int | None = Field(
        default=None, description="Training processes, one per device; `auto` uses all visible GPUs."
    )
    mixed_precision: str | None = Field(default=None, description="no, bf16 or fp16.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute activations in the backward pass: slower, much less memory."
    )
    attention_mechanism: str | None = Field(
        default=None, description="Attention kernel: diffusers, which is PyTorch's SDPA."
    )
    vae_batch_size: int | None = Field(default=None, description="Images per VAE forward.")
    text_encoder_batch_size: int | None = Field(
        default=None, description="Captions per text-encoder forward."
    )
    base_model_precision: str | None = Field(
        default=None, description="no_change, int8-quanto, int8-torchao, nf4-bnb and so on."
    )
    text_encoder_1_precision: str | None = Field(default=None, description="The same values.")
    text_encoder_2_precision: str | None = Field(default=None, description="The same values.")
    vae_dtype: str | None = Field(default=None, description="bf16 or fp32.")
    cpu_threads: int | None = Field(default=None, description="Torch's threads; not set: torch's default.")

    def hardware(self) -> Hardware:
        """Return the profile with its overrides. Raise `dagster.Failure` with the name of an invalid field."""
        overrides: dict[str, Any] = {
            name: value
            for name in Hardware.model_fields
            if name != "profile" and (value := getattr(self, name)) is not None
        }
        try:
            preset = hardware_from_name(self.profile or os.environ.get(PROFILE_VARIABLE) or "auto")
            return Hardware.model_validate(preset.model_dump() | overrides)
        except HardwareError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'profile'}: {problem['msg']}, not {problem['input']!r}"
                for problem in error.errors()
            )
            raise dg.Failure(
                f"the resource `hardware` is invalid: {problems}", allow_retries=False
            ) from error
