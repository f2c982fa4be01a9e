"""The entries of `multidatabackend.json`: where images and captions come from, and what is done to them.

Entries are read by `sdxl_pipeline.config.dataset_parser`, which also fills in what `config.json` says for all of them; here stand their
fields. The checks that need more than one field are in `sdxl_pipeline.config.validators.dataset_rules`.
"""

import hashlib
import os
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from anyascii import anyascii
from pydantic import Field, SecretStr, field_validator, model_validator

from sdxl_pipeline.config.schema.data import CaptionStrategy, ResolutionType
from sdxl_pipeline.config.schema.key_facts import Key
from sdxl_pipeline.config.schema.settings_model import (
    BadValueError,
    Count,
    SettingsModel,
    none_for_zero,
    read_stages,
)

Positive = Annotated[float, Field(gt=0)]

SKIPPABLE_STAGES: Final = ("vae", "aspect", "metadata", "text")

CacheMode = Literal["full", "ondemand", "disable"]
"""full: encoded before the training; ondemand: at first use, then kept; disable: at each use, never written."""

MaskKind = Literal["mask", "segmentation"]
"""mask: a place counts as much as it is white; segmentation: it counts in full where it is not black."""


class ParquetTable(SettingsModel):
    """A table of captions by file: Parquet, or JSON Lines."""

    path: Annotated[str, Key(path="local")] = Field(
        min_length=1, description="The table, relative to the images' folder or absolute."
    )
    filename_column: str = Field("filename", description="Column of the file names.")
    caption_column: str | tuple[str, ...] = Field(
        "caption", description="Column of the captions, or several; a list in it is several captions."
    )
    fallback_caption_column: str | None = Field(
        None, description="Column of the captions for rows whose caption_column is empty."
    )
    identifier_includes_extension: bool = Field(
        False, description="Whether the file names stand there with their extension."
    )
    width_column: str | None = Field(
        None, description="Read by SimpleTuner; sizes are read from the files here."
    )
    height_column: str | None = Field(
        None, description="Read by SimpleTuner; sizes are read from the files here."
    )


class HubColumns(SettingsModel):
    """The object `huggingface` of an image dataset: where to look in the repository. Keys of the entry itself go before it."""

    dataset_name: str | None = Field(None, description="The repository, owner/name.")
    dataset_config: str | None = Field(None, description="The configuration (subset).")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    split: str | None = Field(None, description="The split.")
    image_column: str | None = Field(None, description="Column of the images.")
    caption_column: str | tuple[str, ...] | None = Field(
        None, description="Column of the captions, or several."
    )


class CaptionShuffle(SettingsModel):
    """Further captions made by changing the order of tags."""

    enable: bool = Field(False, description="Whether to make them.")
    count: Count = Field(1, description="Shuffled captions per caption.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the order; not set: the training's."
    )
    split_on: Literal["comma", "space", "period"] = Field("comma", description="What stands between tags.")
    position_start: Annotated[int, Field(ge=0)] = Field(
        0, description="Tags at the beginning that keep their place."
    )
    include_original: bool = Field(True, description="Keep the caption as it was written, too.")


class ImageDataset(SettingsModel):
    """Captioned images: a folder, a dataset of the Hub, a bucket, or a list of addresses."""

    id: str = Field(
        min_length=1,
        max_length=100,
        description="Unique name; its assets carry it as their key's second part.",
    )
    type: Annotated[
        Literal["local", "huggingface", "aws", "csv"], Key(used_by=("source", "scan", "dataset", "masks"))
    ] = Field(
        "local",
        description="Where the images are. local: a folder; huggingface: a dataset repository; aws: a bucket or any fsspec URL; csv: a list of addresses.",
    )
    dataset_type: Annotated[Literal["image", "eval", "conditioning"], Key(used_by=("aspect_buckets",))] = (
        Field(
            "image",
            description="image trains; eval is only measured with the eval loss; conditioning holds the masks of an image dataset.",
        )
    )
    disabled: bool = Field(False, description="Leave this entry out.")
    instance_data_dir: Annotated[Path | None, Key(used_by=("dataset", "masks"))] = Field(
        None, description="Folder of the images, searched recursively; nothing is written into it."
    )
    url: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None,
        description="For type aws: any fsspec URL of a folder, such as s3://bucket/photos, gs://..., https://...; may also be written in instance_data_dir.",
    )
    aws_bucket_name: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="The bucket; with aws_data_prefix instead of url."
    )
    aws_data_prefix: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="Folder within the bucket."
    )
    aws_endpoint_url: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="Address of an S3-compatible service; not set: AWS, or the environment's."
    )
    aws_region_name: str | None = Field(None, description="Region; not set: the environment's.")
    aws_access_key_id: SecretStr | None = Field(
        None, exclude=True, description="Access key; better left to the environment (AWS_ACCESS_KEY_ID)."
    )
    aws_secret_access_key: SecretStr | None = Field(
        None, exclude=True, description="Secret; better left to the environment (AWS_SECRET_ACCESS_KEY)."
    )
    aws_session_token: SecretStr | None = Field(
        None, exclude=True, description="Session token; better left to the environment (AWS_SESSION_TOKEN)."
    )
    dataset_name: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: the repository, owner/name."
    )
    dataset_config: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: the configuration (subset); not set: the default one."
    )
    revision: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: branch, tag or commit; what it stands for is recorded."
    )
    split: Annotated[str, Key(used_by=("source", "dataset"))] = Field(
        "train", description="For type huggingface: the split."
    )
    image_column: Annotated[str, Key(used_by=("source", "dataset"))] = Field(
        "image", description="For type huggingface: column of the images."
    )
    caption_column: Annotated[str | tuple[str, ...] | None, Key(used_by=("scan", "dataset"))] = Field(
        None,
        description="For type huggingface: column of the captions, or several; not set: caption or text.",
    )
    csv_file: Annotated[Path | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type csv: the list, with a header; addresses may be URLs or paths."
    )
    csv_url_column: Annotated[str, Key(used_by=("source", "dataset"))] = Field(
        "url", description="For type csv: column of the addresses."
    )
    csv_caption_column: Annotated[str, Key(used_by=("scan", "dataset"))] = Field(
        "caption", description="For type csv: column of the captions."
    )
    csv_cache_dir: Path | None = Field(
        None,
        description="For type csv: folder that downloads are kept in; not set: the storage resource's.",
    )
    allow_private_addresses: Annotated[bool, Key(used_by=("dataset",))] = Field(
        False,
        description="Let downloads connect to private, loopback and link-local addresses, also by a redirect; only for servers of your own network.",
    )
    metadata_backend: Literal["discovery", "parquet", "huggingface"] = Field(
        "discovery",
        description="Where sizes are read from. They are read from the files whatever stands here, since these are hashed anyway.",
    )
    skip_file_discovery: Annotated[str, Key(inherited="value")] = Field(
        "",
        description="Stages that trust what is recorded and do not look again: metadata or aspect (files), text, vae.",
    )
    verify: bool = Field(
        False,
        description="Read and hash every file again, also those whose size, time and inode are unchanged.",
    )
    find_near_duplicates: Annotated[bool, Key(used_by=("dataset",))] = Field(
        True,
        description="Decode each new image once, to find damaged ones and ones that look alike before anything is encoded.",
    )
    max_num_samples: Annotated[Count | None, Key(used_by=("dataset",))] = Field(
        None, description="Use this many of the images, chosen by their content; not set: all."
    )
    resolution: Annotated[Positive, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))] = (
        Field(description="Size of the training crops; its unit is resolution_type.")
    )
    resolution_type: Annotated[ResolutionType, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        "pixel_area",
        description="area: megapixels; pixel_area: N stands for N*N pixels; pixel: length of the shorter edge.",
    )
    crop: Annotated[bool, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        False, description="Crop to crop_aspect; false keeps each image's aspect, trimmed to its bucket."
    )
    crop_style: Annotated[
        Literal["random", "center", "corner", "face"], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field("random", description="Where the crop is taken; face needs the extra `faces`.")
    crop_aspect: Annotated[
        Literal["square", "preserve", "closest", "random"], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        "square",
        description="Shape of the crop: square; preserve: the image's own; closest or random: one of crop_aspect_buckets.",
    )
    crop_aspect_buckets: Annotated[
        tuple[Positive, ...], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        (),
        description='Aspect ratios (width / height) for crop_aspect closest and random; {"1.0": 3, "0.75": 1} weighs them for random.',
    )
    crop_aspect_weights: Annotated[tuple[Positive, ...], Key(used_by=("aspect_buckets",))] = Field(
        (),
        description="Weights of crop_aspect_buckets for crop_aspect random, in their order; not set: equal.",
    )
    crops_per_image: Annotated[Count, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        1, description="Crops cached per image; successive epochs take them in turn."
    )
    random_flip: Annotated[bool, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        False, description="Train each image mirrored left to right half of the time."
    )
    minimum_image_size: Annotated[
        float, Field(ge=0), Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(0.0, description="Smaller images are left out; in the unit of resolution_type.")
    maximum_image_size: Annotated[
        Positive | None, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(None, description="Larger images are first scaled down to target_downsample_size.")
    target_downsample_size: Annotated[
        Positive | None, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        None, description="Size that images above maximum_image_size are scaled down to before the crop."
    )
    minimum_aspect_ratio: Annotated[Positive | None, Key(masks="of image", used_by=("aspect_buckets",))] = (
        Field(None, description="Images of a smaller width / height are left out.")
    )
    maximum_aspect_ratio: Annotated[Positive | None, Key(masks="of image", used_by=("aspect_buckets",))] = (
        Field(None, description="Images of a larger width / height are left out.")
    )
    max_upscale_threshold: Annotated[
        Annotated[float, Field(ge=0)] | None,
        Key(inherited="value", masks="of image", used_by=("aspect_buckets",)),
    ] = Field(
        None,
        description="Images that would be enlarged by more than this share are left out; 0.2 allows 20 %.",
    )
    aspect_bucket_alignment: Annotated[
        int, Field(ge=8, multiple_of=8), Key(inherited="value", masks="of image", used_by=("aspect_buckets",))
    ] = Field(64, description="Bucket edges are multiples of this many pixels.")
    aspect_bucket_rounding: Annotated[
        int, Field(ge=1, le=9), Key(inherited="value", masks="of image", used_by=("aspect_buckets",))
    ] = Field(2, description="Decimals that aspect ratios are rounded to when buckets are chosen.")
    caption_strategy: Annotated[
        CaptionStrategy, Key(inherited="value", masks="unused", used_by=("dataset",))
    ] = Field(
        "filename",
        description="filename: its stem, _ as space; textfile: the .txt or .caption file beside it, a caption per line; instanceprompt; parquet, csv, huggingface: a column.",
    )
    parquet: Annotated[ParquetTable | None, Key(masks="unused", used_by=("dataset",))] = Field(
        None, description="For caption_strategy parquet: the table and its columns."
    )
    disable_multiline_split: Annotated[bool, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(False, description="A text file is one caption, line breaks and all, instead of one per line.")
    )
    caption_shuffle: Annotated[CaptionShuffle | None, Key(masks="unused", used_by=("dataset",))] = Field(
        None, description="Further captions made by changing the order of tags."
    )
    caption_filter_list: Annotated[Path | tuple[str, ...] | None, Key(masks="unused")] = Field(
        None, description="What to take out of every caption; not set: that of the text_embeds entry."
    )
    instance_prompt: Annotated[str | None, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(None, description="The caption of instanceprompt, or the phrase to prepend.")
    )
    prepend_instance_prompt: Annotated[bool, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(False, description="Put instance_prompt and a space before each caption.")
    )
    only_instance_prompt: Annotated[bool, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(False, description="Use instance_prompt in place of each caption.")
    )
    missing_captions: Annotated[Literal["drop", "empty"], Key(masks="unused", used_by=("dataset",))] = Field(
        "drop", description="Images without a caption: drop them, or train them with the empty prompt."
    )
    conditioning_data: str | None = Field(
        None, description="id of the entry that holds the masks of these images; not set: they have none."
    )
    missing_masks: Annotated[Literal["refuse", "unmasked"], Key(masks="unused")] = Field(
        "refuse",
        description="Images without a mask, where there is conditioning_data: stop and name them, or train them whole.",
    )
    conditioning_type: MaskKind | None = Field(
        None,
        description="For dataset_type conditioning. mask: the loss of each place is weighted from black (0) to white (1); segmentation: all that is not black counts in full.",
    )
    source_dataset_id: str | None = Field(
        None,
        description="For dataset_type conditioning: the image dataset whose conditioning_data names this entry; may be left out.",
    )
    is_regularisation_data: bool = Field(
        False,
        description="Prior preservation: these images are trained towards what the base model predicts of them, without the adapter.",
    )
    repeats: Annotated[int, Field(ge=0), Key(masks="unused")] = Field(
        0, description="Extra passes per epoch: 0 sees each image once."
    )
    probability: Annotated[Positive, Key(masks="unused")] = Field(
        1.0, description="Weight of this dataset against the others when batches are drawn."
    )
    cache_dir_vae: Annotated[Path | None, Key(masks="unused")] = Field(
        None, description="Root of the latent store; not set: the storage resource's."
    )
    vae_cache_ondemand: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False, description="Encode latents at first use in the training, and keep them."
    )
    vae_cache_disable: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False, description="Encode latents at each use, and keep none."
    )
    vae_cache_clear_each_epoch: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False,
        description="Cut each image anew in every epoch: latents are encoded at each use, and none kept.",
    )
    text_embeds: Annotated[str | None, Key(masks="unused")] = Field(
        None, description="id of the text_embeds entry to use; not set: the default one."
    )

    @property
    def asset_name(self) -> str:
        """Return `id` as an asset key may be written."""
        return asset_name(self.id)

    @property
    def latent_cache(self) -> CacheMode:
        """When latents are encoded, and whether they are kept."""
        if self.vae_cache_disable or self.vae_cache_clear_each_epoch:
            return "disable"
        return "ondemand" if self.vae_cache_ondemand else "full"

    @property
    def skipped_stages(self) -> frozenset[str]:
        """The stages named by `skip_file_discovery`."""
        return frozenset(word for word in re.split(r"[\s,]+", self.skip_file_discovery) if word)

    @field_validator("caption_strategy", mode="before")
    @classmethod
    def _read_caption_strategy(cls, value: Any) -> Any:
        return "instanceprompt" if value == "instance_prompt" else value

    @field_validator("skip_file_discovery", mode="before")
    @classmethod
    def _read_stages(cls, value: Any) -> Any:
        return read_stages(value)

    @field_validator(
        "maximum_image_size",
        "target_downsample_size",
        "minimum_aspect_ratio",
        "maximum_aspect_ratio",
        "max_num_samples",
        mode="before",
    )
    @classmethod
    def _zero_is_not_set(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("conditioning_data", mode="before")
    @classmethod
    def _read_conditioning_data(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if len(value) > 1:
            raise BadValueError("names several entries", "name one: an image has one mask")
        return value[0] if value else None

    @field_validator("caption_shuffle", mode="before")
    @classmethod
    def _read_caption_shuffle(cls, value: Any) -> Any:
        return None if value is False or value == {} else {"enable": True} if value is True else value

    @field_validator("instance_data_dir", mode="before")
    @classmethod
    def _empty_folder_is_not_set(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="before")
    @classmethod
    def _read_entry(cls, values: Any) -> Any:
        """Bring a URL in instance_data_dir and weighted aspect buckets into their own fields; a list of captions is read as one."""
        values = dict(values)
        if values.get("type") in ("csv", "huggingface") and not values.get("caption_strategy"):
            values["caption_strategy"] = values["type"]
        folder = values.get("instance_data_dir")
        if isinstance(folder, str) and "://" in folder and not values.get("url"):
            values["url"] = values.pop("instance_data_dir")
        buckets = values.get("crop_aspect_buckets")
        if isinstance(buckets, dict) and not values.get("crop_aspect_weights"):
            values["crop_aspect_buckets"] = tuple(buckets)
            values["crop_aspect_weights"] = tuple(buckets.values())
        elif isinstance(buckets, list) and buckets and all(isinstance(item, dict) for item in buckets):
            values["crop_aspect_buckets"] = tuple(
                item.get("aspect", item.get("aspect_bucket")) for item in buckets
            )
            values.setdefault("crop_aspect_weights", tuple(item.get("weight", 1.0) for item in buckets))
        return values


class TextEmbedsDataset(SettingsModel):
    """Where the captions' embeddings are kept."""

    id: str = Field(min_length=1, max_length=100, description="Unique name.")
    type: Literal["local"] = Field("local", description="Where the embeddings are kept: a folder.")
    dataset_type: Literal["text_embeds"] = Field("text_embeds", description="This kind of entry.")
    disabled: bool = Field(False, description="Leave this entry out.")
    default: bool = Field(
        False, description="Keeps the validation prompts, and the captions of datasets that name no other."
    )
    cache_dir: Path | None = Field(None, description="Root of the store; not set: the storage resource's.")
    write_batch_size: Annotated[Count, Key(inherited="value")] = Field(
        128, description="Embeddings per file of the store."
    )
    text_cache_ondemand: Annotated[bool, Key(inherited="value")] = Field(
        False, description="Encode captions at first use in the training, and keep their embeddings."
    )
    text_cache_disable: Annotated[bool, Key(inherited="value")] = Field(
        False, description="Encode captions at each use, and keep none."
    )
    skip_file_discovery: str = Field(
        "", description="`text`: the datasets' captions are not looked at again."
    )
    caption_filter_list: Path | tuple[str, ...] | None = Field(
        None,
        description="What to take out of every caption: a list, or a text or JSON file; a line is literal text, a regular expression, or s/find/replace/.",
    )

    @field_validator("skip_file_discovery", mode="before")
    @classmethod
    def _read_stages(cls, value: Any) -> Any:
        return read_stages(value)

    @property
    def text_cache(self) -> CacheMode:
        """When captions are encoded, and whether their embeddings are kept."""
        return "disable" if self.text_cache_disable else "ondemand" if self.text_cache_ondemand else "full"


def asset_name(name: str) -> str:
    """Return `name` as an asset key and group may be written: letters and digits of ASCII, and "_".

    Each other ASCII character becomes "_". A name in other letters is transliterated; since several names may read alike then, the
    digest of the name itself follows.
    """
    if name.isascii():
        return re.sub(r"[^A-Za-z0-9_]", "_", name)
    composed = unicodedata.normalize("NFC", name)  # macOS decomposes the names of files
    letters = re.sub(r"[^A-Za-z0-9_]+", "_", anyascii(composed)).strip("_")[:60]
    digest = hashlib.sha256(os.fsencode(composed)).hexdigest()
    return f"{letters or 'unnamed'}_{digest[:8]}"
