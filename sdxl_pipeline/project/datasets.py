"""The entries of `multidatabackend.json`: where pictures and captions come from, and what is done to them.

Entries are read by `sdxl_pipeline.project.backends`, which also fills in what `config.json` says for all of them; here stand their
fields and the checks that need more than one field.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, field_validator

from sdxl_pipeline.project.settings_model import SettingsModel
from sdxl_pipeline.project.training import CaptionStrategy, Count, ResolutionType

Positive = Annotated[float, Field(gt=0)]

INHERITED: Final = (
    "max_upscale_threshold",
    "aspect_bucket_rounding",
    "aspect_bucket_alignment",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "skip_file_discovery",
)
"""Keys of `config.json` that hold for every image dataset without its own."""

INHERITED_SIZES: Final = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
"""The same for sizes, whose unit is `resolution_type`: they hold where the unit is the same."""

SKIPPABLE_STAGES: Final = ("vae", "aspect", "metadata", "text")


class ImageDataset(SettingsModel):
    """A folder of captioned pictures."""

    id: str = Field(min_length=1, description="Unique name; it becomes a lane of the asset graph.")
    type: Literal["local"] = Field("local", description="Where the pictures are: a folder.")
    dataset_type: Literal["image", "eval"] = Field(
        "image", description="image trains; eval is only measured with the eval loss."
    )
    disabled: bool = Field(False, description="Leave this entry out.")
    instance_data_dir: Path = Field(
        description="Folder of the pictures, searched recursively; nothing is written into it."
    )
    metadata_backend: Literal["discovery"] = Field(
        "discovery", description="Sizes are read from the files themselves."
    )
    skip_file_discovery: str = Field(
        "",
        description="Stages (vae, aspect, metadata, text) not to scan again; every stage scans, and says so in a warning.",
    )
    resolution: Positive = Field(description="Size of the training crops; its unit is resolution_type.")
    resolution_type: ResolutionType = Field(
        "pixel_area",
        description="area: megapixels; pixel_area: N stands for N*N pixels; pixel: length of the shorter edge.",
    )
    crop: bool = Field(
        False, description="Crop to crop_aspect; false keeps each picture's aspect, trimmed to its bucket."
    )
    crop_style: Literal["random", "center", "corner"] = Field(
        "random", description="Where the crop is taken."
    )
    crop_aspect: Literal["square", "preserve"] = Field(
        "square", description="Shape of the crop: square, or the bucket nearest to the picture's own."
    )
    minimum_image_size: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Smaller pictures are left out; in the unit of resolution_type."
    )
    maximum_image_size: Positive | None = Field(
        None, description="Larger pictures are first scaled down to target_downsample_size."
    )
    target_downsample_size: Positive | None = Field(
        None, description="Size that pictures above maximum_image_size are scaled down to before the crop."
    )
    minimum_aspect_ratio: Positive | None = Field(
        None, description="Pictures of a smaller width / height are left out."
    )
    maximum_aspect_ratio: Positive | None = Field(
        None, description="Pictures of a larger width / height are left out."
    )
    max_upscale_threshold: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Pictures that would be enlarged by more than this share are left out; 0.2 allows 20 %.",
    )
    aspect_bucket_alignment: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        64, description="Bucket edges are multiples of this many pixels."
    )
    aspect_bucket_rounding: Annotated[int, Field(ge=1, le=9)] = Field(
        2, description="Decimals that aspect ratios are rounded to when buckets are chosen."
    )
    caption_strategy: CaptionStrategy = Field(
        "filename",
        description="filename: its stem, _ as space; textfile: the .txt beside it, a caption per line; instanceprompt.",
    )
    instance_prompt: str | None = Field(
        None, description="The caption of instanceprompt, or the phrase to prepend."
    )
    prepend_instance_prompt: bool = Field(
        False, description="Put instance_prompt and a space before each caption."
    )
    only_instance_prompt: bool = Field(False, description="Use instance_prompt in place of each caption.")
    missing_captions: Literal["drop", "empty"] = Field(
        "drop", description="Pictures without a caption: drop them, or train them with the empty prompt."
    )
    repeats: Annotated[int, Field(ge=0)] = Field(
        0, description="Extra passes per epoch: 0 sees each picture once."
    )
    probability: Positive = Field(
        1.0, description="Weight of this dataset against the others when batches are drawn."
    )
    cache_dir_vae: Path | None = Field(
        None, description="Root of the latent store; not set: the storage resource's."
    )
    text_embeds: str | None = Field(
        None, description="id of the text_embeds entry to use; not set: the default one."
    )

    @property
    def asset_name(self) -> str:
        """`id` with every character that an asset key cannot hold replaced by "_"."""
        return asset_name(self.id)

    @field_validator("caption_strategy", mode="before")
    @classmethod
    def _read_caption_strategy(cls, value: Any) -> Any:
        return "instanceprompt" if value == "instance_prompt" else value


class TextEmbedsDataset(SettingsModel):
    """Where the captions' embeddings are kept."""

    id: str = Field(min_length=1, description="Unique name.")
    type: Literal["local"] = Field("local", description="Where the embeddings are kept: a folder.")
    dataset_type: Literal["text_embeds"] = Field("text_embeds", description="This kind of entry.")
    disabled: bool = Field(False, description="Leave this entry out.")
    default: bool = Field(
        False, description="Keeps the validation prompts, and the captions of datasets that name no other."
    )
    cache_dir: Path | None = Field(None, description="Root of the store; not set: the storage resource's.")
    write_batch_size: Count = Field(128, description="Embeddings per file of the store.")


class Finding(NamedTuple):
    """A combination of settings that cannot be meant: the key to change, why, and what to write."""

    key: str
    message: str
    remedy: str


def asset_name(name: str) -> str:
    """`name` with every character outside [A-Za-z0-9_] replaced by "_"."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def check_images(dataset: ImageDataset) -> Iterator[Finding]:
    """What cannot be meant in one image dataset, though each value by itself could."""
    yield from _check_sizes(dataset)
    least, most = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if least is not None and most is not None and least > most:
        yield Finding(
            "minimum_aspect_ratio",
            f"is above maximum_aspect_ratio ({most:g}), so every picture would be left out",
            "exchange the two",
        )
    prompt_user = (
        "caption_strategy instanceprompt"
        if dataset.caption_strategy == "instanceprompt"
        else "only_instance_prompt"
        if dataset.only_instance_prompt
        else "prepend_instance_prompt"
        if dataset.prepend_instance_prompt
        else None
    )
    if prompt_user and not (dataset.instance_prompt or "").strip():
        yield Finding(
            "instance_prompt",
            f"is missing, and {prompt_user} needs it",
            "write the prompt for these pictures",
        )
    words = re.split(r"[\s,]+", dataset.skip_file_discovery.strip())
    unknown = [word for word in words if word and word not in SKIPPABLE_STAGES]
    if unknown:
        yield Finding(
            "skip_file_discovery",
            f"names unknown stages: {', '.join(unknown)}",
            f"write any of {', '.join(SKIPPABLE_STAGES)}",
        )


def _check_sizes(dataset: ImageDataset) -> Iterator[Finding]:
    sizes = {key: getattr(dataset, key) for key in INHERITED_SIZES}
    in_megapixels = dataset.resolution_type == "area"
    for key, size in sizes.items():
        if not size:
            continue
        if in_megapixels and size > (
            10 if key == "resolution" else 5 if key == "minimum_image_size" else 100
        ):
            yield Finding(
                key,
                f"{size:g} would be megapixels, since resolution_type is area",
                f'write megapixels, such as {size**2 / 1e6:.2g}, or "resolution_type": "pixel_area" for pixels',
            )
        elif not in_megapixels and size < (64 if key == "resolution" else 16):
            yield Finding(
                key,
                f"{size:g} would be pixels, since resolution_type is {dataset.resolution_type}",
                f'write pixels, such as {1000 * size**0.5:.0f}, or "resolution_type": "area" for megapixels',
            )
    maximum, target = sizes["maximum_image_size"], sizes["target_downsample_size"]
    if (maximum is None) != (target is None):
        given, absent = "maximum_image_size", "target_downsample_size"
        if maximum is None:
            given, absent = absent, given
        yield Finding(
            given,
            f"is given without {absent}",
            f"write both, or neither; for example {absent}: {sizes[given]:g}",
        )
    if maximum is not None and target is not None and target > maximum:
        yield Finding(
            "target_downsample_size",
            f"is above maximum_image_size ({maximum:g}), so large pictures would be enlarged",
            f"write at most {maximum:g}",
        )
