"""Settings of the adapter."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.lycoris import LycorisSettings
from sdxl_pipeline.config.schema.settings_model import BadValueError, Count, SettingsModel, read_list

ATTENTION_PROJECTIONS: Final = ("to_k", "to_q", "to_v", "to_out.0")
"""Suffixes of the UNet's attention projections."""


class AdapterSettings(SettingsModel):
    """The adapter."""

    lora_type: Literal["standard", "lycoris"] = Field(
        "standard",
        description="Adapter kind: PEFT's LoRA, or a LyCORIS adapter (extra `lycoris`) configured by lycoris_config.",
    )
    lora_rank: Annotated[Count, Key(on_card=True, lora_type="standard")] = Field(
        16, description="Rank of the update matrices."
    )
    lora_alpha: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Key(Identity.EFFECTIVE_VALUE, on_card=True, lora_type="standard"),
    ] = Field(None, description="Updates are scaled by lora_alpha / lora_rank; not set: equal to lora_rank.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1), Key(on_card=True, lora_type="standard")] = Field(
        0.0, description="Probability of dropping an adapter's input."
    )
    lora_init_type: Annotated[Literal["default", "gaussian"], Key(lora_type="standard")] = Field(
        "default",
        description="Initialization of the first matrix: uniform, or normal with standard deviation 1 / lora_rank.",
    )
    use_dora: Annotated[bool, Key(on_card=True, lora_type="standard")] = Field(
        False, description="DoRA: train magnitude and direction of the weights' rows separately."
    )
    lora_target_modules: Annotated[tuple[str, ...], Key(on_card=True, lora_type="standard")] = Field(
        ATTENTION_PROJECTIONS,
        min_length=1,
        description="Name suffixes of the UNet layers (linear or convolution) that get an adapter: a list, or names joined by commas.",
    )
    lycoris_config: Annotated[
        LycorisSettings | str | None, Key(path="name or path", on_card=True, lora_type="lycoris")
    ] = Field(None, description="JSON file of the LyCORIS adapter (keys below), or its content.")
    init_lokr_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, Key(on_card=True, lora_type="lycoris")
    ] = Field(
        None,
        description="Initialize a full-matrix LoKr with noise of the weights' mean and standard deviation times this; not set: with a zero update.",
    )
    init_lora: Annotated[str | None, Key(Identity.FILE_CONTENT, path="name or path", on_card=True)] = Field(
        None,
        description="Initialize from an adapter: a .safetensors file, or its Hub id with or without a file name (owner/name/file.safetensors).",
    )

    @property
    def effective_lora_alpha(self) -> float:
        """Return `lora_alpha`, or the rank if it is not set."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def lycoris(self) -> LycorisSettings:
        """Return the LyCORIS configuration. Raise ValueError if there is none, or only the name of its file."""
        if not isinstance(self.lycoris_config, LycorisSettings):
            raise ValueError(f"lycoris_config is {self.lycoris_config!r}, not a configuration that was read")
        return self.lycoris_config

    @field_validator("lora_init_type", mode="before")
    @classmethod
    def _read_init_type(cls, value: Any) -> Any:
        if value in ("pissa", "olora", "loftq"):
            raise BadValueError(
                f"{value} changes the base model's weights, so the adapter would not match the published base model",
                'write "default" or "gaussian"',
            )
        return "default" if value in (True, "true", "True") else value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _read_target_modules(cls, value: Any) -> Any:
        return read_list(value)
