"""Several processes: how a whole UNet is divided among them."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import SettingsModel


class ShardingSettings(SettingsModel):
    """Several processes: how a whole UNet is divided among them."""

    fsdp_enable: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        False,
        description="Divide weights, gradients and optimizer state of model_type full among the processes, in place of a copy on each.",
    )
    fsdp_version: Annotated[Literal[2], Key(Identity.COMPUTE)] = Field(
        2, description="PyTorch's FSDP2 (fully_shard)."
    )
    fsdp_reshard_after_forward: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        True,
        description="Give a block's weights back after its forward pass and gather them again for the backward pass: less memory, more traffic.",
    )

    @field_validator("fsdp_version", mode="before")
    @classmethod
    def _read_version(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value
