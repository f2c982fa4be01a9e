"""Datasets: the file that lists them, and defaults for its entries."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import (
    Count,
    SettingsModel,
    none_for_zero,
    read_stages,
)

ResolutionType = Literal["area", "pixel_area", "pixel"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"]


class DataSettings(SettingsModel):
    """Datasets: the file that lists them, and defaults for its entries."""

    data_backend_config: Annotated[str, Key(Identity.SAMPLES, path="local", overridable=False)] = Field(
        "multidatabackend.json", min_length=1, description="The file that lists the datasets."
    )
    resolution: Annotated[float, Field(gt=0), Key(Identity.SAMPLES, overridable=False)] = Field(
        1024.0, description="Default of the datasets' resolution."
    )
    resolution_type: Annotated[ResolutionType, Key(Identity.SAMPLES, overridable=False)] = Field(
        "pixel_area", description="Default of the datasets' resolution_type."
    )
    minimum_image_size: Annotated[
        Annotated[float, Field(ge=0)] | None, Key(Identity.SAMPLES, overridable=False)
    ] = Field(None, description="Default of the datasets' minimum_image_size.")
    maximum_image_size: Annotated[
        Annotated[float, Field(gt=0)] | None, Key(Identity.SAMPLES, overridable=False)
    ] = Field(None, description="Default of the datasets' maximum_image_size.")
    target_downsample_size: Annotated[
        Annotated[float, Field(gt=0)] | None, Key(Identity.SAMPLES, overridable=False)
    ] = Field(None, description="Default of the datasets' target_downsample_size.")
    max_upscale_threshold: Annotated[
        Annotated[float, Field(ge=0)] | None, Key(Identity.SAMPLES, overridable=False)
    ] = Field(None, description="Default of the datasets' max_upscale_threshold.")
    aspect_bucket_rounding: Annotated[int, Field(ge=1, le=9), Key(Identity.SAMPLES, overridable=False)] = (
        Field(2, description="Decimals that aspect ratios are rounded to when buckets are chosen.")
    )
    aspect_bucket_alignment: Annotated[
        int, Field(ge=8, multiple_of=8), Key(Identity.SAMPLES, overridable=False)
    ] = Field(64, description="Bucket edges are multiples of this many pixels.")
    caption_strategy: Annotated[CaptionStrategy, Key(Identity.SAMPLES, overridable=False)] = Field(
        "filename", description="Default of the datasets' caption_strategy."
    )
    instance_prompt: Annotated[str | None, Key(Identity.SAMPLES, overridable=False)] = Field(
        None, description="Default of the datasets' instance_prompt."
    )
    prepend_instance_prompt: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' prepend_instance_prompt."
    )
    only_instance_prompt: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' only_instance_prompt."
    )
    disable_multiline_split: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' disable_multiline_split."
    )
    skip_file_discovery: Annotated[str, Key(Identity.SAMPLES, overridable=False)] = Field(
        "", description="Default of the datasets' skip_file_discovery."
    )
    write_batch_size: Annotated[Count, Key(Identity.COMPUTE, overridable=False)] = Field(
        128, description="Default of the text_embeds entries' write_batch_size."
    )
    vae_cache_ondemand: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' vae_cache_ondemand."
    )
    vae_cache_disable: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' vae_cache_disable."
    )
    vae_cache_clear_each_epoch: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the datasets' vae_cache_clear_each_epoch."
    )
    text_cache_ondemand: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the text_embeds entries' text_cache_ondemand."
    )
    text_cache_disable: Annotated[bool, Key(Identity.SAMPLES, overridable=False)] = Field(
        False, description="Default of the text_embeds entries' text_cache_disable."
    )
    tokenizer_max_length: Annotated[Literal[77, 154, 231], Key(Identity.SAMPLES, overridable=False)] = Field(
        77,
        description="Maximum tokens of a caption; longer ones are truncated. 77 is the text encoders' context length; 154 and 231 encode captions in two and three windows.",
    )
    allow_dataset_oversubscription: Annotated[
        bool, Key(Identity.SAMPLING_WEIGHTS, used_by=("training_plan",))
    ] = Field(
        False,
        description="Raise the repeats of datasets that are too small for one step, instead of failing.",
    )

    @property
    def text_windows(self) -> int:
        """Return the number of 77-token windows of each caption."""
        return self.tokenizer_max_length // 77

    @field_validator("caption_strategy", mode="before")
    @classmethod
    def _normalize_caption_strategy(cls, value: Any) -> Any:
        return "instanceprompt" if value == "instance_prompt" else value

    @field_validator("skip_file_discovery", mode="before")
    @classmethod
    def _parse_stages(cls, value: Any) -> Any:
        return read_stages(value)

    @field_validator("maximum_image_size", "target_downsample_size", mode="before")
    @classmethod
    def _zero_size_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("tokenizer_max_length", mode="before")
    @classmethod
    def _parse_int(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value
