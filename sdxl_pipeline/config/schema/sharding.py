"""Settings of FSDP sharding."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import SettingsModel


class ShardingSettings(SettingsModel):
    """Sharding of a full UNet over processes."""

    fsdp_enable: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        False,
        description="Shard weights, gradients and optimizer state of model_type full over the processes, instead of a replica on each.",
    )
    fsdp_version: Annotated[Literal[2], Key(Identity.COMPUTE)] = Field(
        2, description="PyTorch's FSDP2 (fully_shard)."
    )
    fsdp_reshard_after_forward: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        True,
        description="Reshard a block's weights after its forward pass and gather them again for the backward pass: less memory, more communication.",
    )

    @field_validator("fsdp_version", mode="before")
    @classmethod
    def _parse_version(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value
