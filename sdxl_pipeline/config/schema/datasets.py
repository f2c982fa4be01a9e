"""The entries of `multidatabackend.json`: source, geometry and captions of images, and text embeddings.

`sdxl_pipeline.config.dataset_parser` reads the entries and fills in the defaults of `config.json`. The checks that need more than one
field are in `sdxl_pipeline.config.validators.dataset_rules`.
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
"""full: encoded before the training; ondemand: encoded at first use and cached; disable: encoded at each use, not cached."""

MaskKind = Literal["mask", "segmentation"]
"""mask: the loss weight of a pixel is its brightness; segmentation: it is 1 where the pixel is not black."""


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
        False, description="Whether the file names in the table have an extension."
    )
    width_column: str | None = Field(
        None, description="Read by SimpleTuner; sizes are read from the files here."
    )
    height_column: str | None = Field(
        None, description="Read by SimpleTuner; sizes are read from the files here."
    )


class HubColumns(SettingsModel):
    """The object `huggingface` of an image dataset: repository and columns. Keys of the entry itself take precedence."""

    dataset_name: str | None = Field(None, description="The repository, owner/name.")
    dataset_config: str | None = Field(None, description="The configuration (subset).")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    split: str | None = Field(None, description="The split.")
    image_column: str | None = Field(None, description="Column of the images.")
    caption_column: str | tuple[str, ...] | None = Field(
        None, description="Column of the captions, or several."
    )


class CaptionShuffle(SettingsModel):
    """Additional captions with shuffled tags."""

    enable: bool = Field(False, description="Whether to add them.")
    count: Count = Field(1, description="Number of shuffled captions per caption.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the shuffles; not set: the training's seed."
    )
    split_on: Literal["comma", "space", "period"] = Field("comma", description="Separator of the tags.")
    position_start: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of leading tags that are not shuffled."
    )
    include_original: bool = Field(True, description="Also use the original caption.")


class ImageDataset(SettingsModel):
    """Captioned images from a folder, a Hub dataset, a bucket, or a list of URLs."""

    id: str = Field(
        min_length=1,
        max_length=100,
        description="Unique name; the second part of the asset keys.",
    )
    type: Annotated[
        Literal["local", "huggingface", "aws", "csv"], Key(used_by=("source", "scan", "dataset", "masks"))
    ] = Field(
        "local",
        description="Source of the images. local: a folder; huggingface: a dataset repository; aws: a bucket or any fsspec URL; csv: a list of URLs.",
    )
    dataset_type: Annotated[Literal["image", "eval", "conditioning"], Key(used_by=("aspect_buckets",))] = (
        Field(
            "image",
            description="image: training images; eval: images of the eval loss only; conditioning: masks of an image dataset.",
        )
    )
    disabled: bool = Field(False, description="Ignore this entry.")
    instance_data_dir: Annotated[Path | None, Key(used_by=("dataset", "masks"))] = Field(
        None, description="Folder of the images, searched recursively; never written to."
    )
    url: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None,
        description="For type aws: any fsspec URL of a folder, such as s3://bucket/photos, gs://..., https://...; may also be written in instance_data_dir.",
    )
    aws_bucket_name: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="Name of the bucket; with aws_data_prefix an alternative to url."
    )
    aws_data_prefix: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="Folder within the bucket."
    )
    aws_endpoint_url: Annotated[str | None, Key(used_by=("source", "dataset", "masks"))] = Field(
        None, description="Endpoint of an S3-compatible service; not set: AWS, or from the environment."
    )
    aws_region_name: str | None = Field(None, description="Region; not set: from the environment.")
    aws_access_key_id: SecretStr | None = Field(
        None, exclude=True, description="Access key; prefer the environment variable AWS_ACCESS_KEY_ID."
    )
    aws_secret_access_key: SecretStr | None = Field(
        None, exclude=True, description="Secret key; prefer the environment variable AWS_SECRET_ACCESS_KEY."
    )
    aws_session_token: SecretStr | None = Field(
        None, exclude=True, description="Session token; prefer the environment variable AWS_SESSION_TOKEN."
    )
    dataset_name: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: the repository, owner/name."
    )
    dataset_config: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: the configuration (subset); not set: the default one."
    )
    revision: Annotated[str | None, Key(used_by=("source", "dataset"))] = Field(
        None, description="For type huggingface: branch, tag or commit; the resolved commit is recorded."
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
        None, description="For type csv: the CSV file with a header; entries are URLs or paths."
    )
    csv_url_column: Annotated[str, Key(used_by=("source", "dataset"))] = Field(
        "url", description="For type csv: column of the URLs."
    )
    csv_caption_column: Annotated[str, Key(used_by=("scan", "dataset"))] = Field(
        "caption", description="For type csv: column of the captions."
    )
    csv_cache_dir: Path | None = Field(
        None,
        description="For type csv: folder of the downloads; not set: the storage resource's.",
    )
    allow_private_addresses: Annotated[bool, Key(used_by=("dataset",))] = Field(
        False,
        description="Allow downloads from private, loopback and link-local addresses, including redirects; only for servers of your own network.",
    )
    metadata_backend: Literal["discovery", "parquet", "huggingface"] = Field(
        "discovery",
        description="Source of image sizes in SimpleTuner. Here sizes are always read from the files, which are hashed in any case.",
    )
    skip_file_discovery: Annotated[str, Key(inherited="value")] = Field(
        "",
        description="Stages that reuse recorded results without checking the files again: metadata or aspect (files), text, vae.",
    )
    verify: bool = Field(
        False,
        description="Read and hash every file again, also those whose size, time and inode are unchanged.",
    )
    find_near_duplicates: Annotated[bool, Key(used_by=("dataset",))] = Field(
        True,
        description="Decode each new image once, to find corrupt images and near duplicates before encoding.",
    )
    max_num_samples: Annotated[Count | None, Key(used_by=("dataset",))] = Field(
        None, description="Use this many images, selected by digest; not set: all."
    )
    resolution: Annotated[Positive, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))] = (
        Field(description="Size of the training crops; its unit is resolution_type.")
    )
    resolution_type: Annotated[ResolutionType, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        "pixel_area",
        description="area: megapixels; pixel_area: N means N*N pixels; pixel: length of the shorter edge.",
    )
    crop: Annotated[bool, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        False, description="Crop to crop_aspect; false preserves each image's aspect, cropped to its bucket."
    )
    crop_style: Annotated[
        Literal["random", "center", "corner", "face"], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field("random", description="Position of the crop; face needs the extra `faces`.")
    crop_aspect: Annotated[
        Literal["square", "preserve", "closest", "random"], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        "square",
        description="Aspect of the crop: square; preserve: the image's own; closest or random: one of crop_aspect_buckets.",
    )
    crop_aspect_buckets: Annotated[
        tuple[Positive, ...], Key(masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        (),
        description='Aspect ratios (width / height) for crop_aspect closest and random; {"1.0": 3, "0.75": 1} weights them for random.',
    )
    crop_aspect_weights: Annotated[tuple[Positive, ...], Key(used_by=("aspect_buckets",))] = Field(
        (),
        description="Weights of crop_aspect_buckets for crop_aspect random, in their order; not set: equal.",
    )
    crops_per_image: Annotated[Count, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        1, description="Crops cached per image; successive epochs cycle through them."
    )
    random_flip: Annotated[bool, Key(masks="of image", used_by=("aspect_buckets",))] = Field(
        False, description="Flip images horizontally with probability 0.5."
    )
    minimum_image_size: Annotated[
        float, Field(ge=0), Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(0.0, description="Smaller images are dropped; in the unit of resolution_type.")
    maximum_image_size: Annotated[
        Positive | None, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(None, description="Larger images are first scaled down to target_downsample_size.")
    target_downsample_size: Annotated[
        Positive | None, Key(inherited="size", masks="of image", used_by=("aspect_buckets",))
    ] = Field(
        None, description="Size that images above maximum_image_size are scaled down to before the crop."
    )
    minimum_aspect_ratio: Annotated[Positive | None, Key(masks="of image", used_by=("aspect_buckets",))] = (
        Field(None, description="Images with a smaller width / height are dropped.")
    )
    maximum_aspect_ratio: Annotated[Positive | None, Key(masks="of image", used_by=("aspect_buckets",))] = (
        Field(None, description="Images with a larger width / height are dropped.")
    )
    max_upscale_threshold: Annotated[
        Annotated[float, Field(ge=0)] | None,
        Key(inherited="value", masks="of image", used_by=("aspect_buckets",)),
    ] = Field(
        None,
        description="Images that would be upscaled by more than this share are dropped; 0.2 allows 20 %.",
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
        Field(False, description="A text file is one caption including line breaks, instead of one per line.")
    )
    caption_shuffle: Annotated[CaptionShuffle | None, Key(masks="unused", used_by=("dataset",))] = Field(
        None, description="Additional captions with shuffled tags."
    )
    caption_filter_list: Annotated[Path | tuple[str, ...] | None, Key(masks="unused")] = Field(
        None, description="Filters applied to every caption; not set: those of the text_embeds entry."
    )
    instance_prompt: Annotated[str | None, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(None, description="The caption of instanceprompt, or the phrase to prepend.")
    )
    prepend_instance_prompt: Annotated[bool, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(False, description="Put instance_prompt and a space before each caption.")
    )
    only_instance_prompt: Annotated[bool, Key(inherited="value", masks="unused", used_by=("dataset",))] = (
        Field(False, description="Use instance_prompt instead of each caption.")
    )
    missing_captions: Annotated[Literal["drop", "empty"], Key(masks="unused", used_by=("dataset",))] = Field(
        "drop", description="Images without a caption: drop them, or train with the empty prompt."
    )
    conditioning_data: str | None = Field(
        None, description="id of the entry with the masks of these images; not set: no masks."
    )
    missing_masks: Annotated[Literal["refuse", "unmasked"], Key(masks="unused")] = Field(
        "refuse",
        description="Images without a mask, if there is conditioning_data: fail and list them, or train without a mask.",
    )
    conditioning_type: MaskKind | None = Field(
        None,
        description="For dataset_type conditioning. mask: the loss is weighted from black (0) to white (1); segmentation: all pixels that are not black have weight 1.",
    )
    source_dataset_id: str | None = Field(
        None,
        description="For dataset_type conditioning: the image dataset whose conditioning_data names this entry; optional.",
    )
    is_regularisation_data: bool = Field(
        False,
        description="Prior preservation: the target of these images is the base model's prediction without the adapter.",
    )
    repeats: Annotated[int, Field(ge=0), Key(masks="unused")] = Field(
        0, description="Extra repeats per epoch: 0 uses each image once."
    )
    probability: Annotated[Positive, Key(masks="unused")] = Field(
        1.0, description="Sampling weight of this dataset relative to the others."
    )
    cache_dir_vae: Annotated[Path | None, Key(masks="unused")] = Field(
        None, description="Root of the latent store; not set: the storage resource's."
    )
    vae_cache_ondemand: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False, description="Encode latents at first use in the training, and cache them."
    )
    vae_cache_disable: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False, description="Encode latents at each use, without a cache."
    )
    vae_cache_clear_each_epoch: Annotated[bool, Key(inherited="value", masks="unused")] = Field(
        False,
        description="Crop each image anew in every epoch: latents are encoded at each use, without a cache.",
    )
    text_embeds: Annotated[str | None, Key(masks="unused")] = Field(
        None, description="id of the text_embeds entry to use; not set: the default one."
    )

    @property
    def asset_name(self) -> str:
        """Return `id` as a valid asset key."""
        return asset_name(self.id)

    def stage_name(self, stage: str) -> str:
        """Return the name of this dataset's asset of a stage: `<asset_name>_<stage>`, unique in a project since no suffix ends in another."""
        return f"{self.asset_name}_{stage}"

    @property
    def latent_cache(self) -> CacheMode:
        """Return when latents are encoded, and whether they are cached."""
        if self.vae_cache_disable or self.vae_cache_clear_each_epoch:
            return "disable"
        return "ondemand" if self.vae_cache_ondemand else "full"

    @property
    def skipped_stages(self) -> frozenset[str]:
        """Return the stages in `skip_file_discovery`."""
        return frozenset(word for word in re.split(r"[\s,]+", self.skip_file_discovery) if word)

    @field_validator("caption_strategy", mode="before")
    @classmethod
    def _normalize_caption_strategy(cls, value: Any) -> Any:
        return "instanceprompt" if value == "instance_prompt" else value

    @field_validator("skip_file_discovery", mode="before")
    @classmethod
    def _parse_stages(cls, value: Any) -> Any:
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
    def _zero_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("conditioning_data", mode="before")
    @classmethod
    def _unwrap_single_mask(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if len(value) > 1:
            raise BadValueError("lists several entries", "write one: an image has one mask")
        return value[0] if value else None

    @field_validator("caption_shuffle", mode="before")
    @classmethod
    def _parse_caption_shuffle(cls, value: Any) -> Any:
        return None if value is False or value == {} else {"enable": True} if value is True else value

    @field_validator("instance_data_dir", mode="before")
    @classmethod
    def _empty_folder_to_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="before")
    @classmethod
    def _normalize_entry(cls, values: Any) -> Any:
        """Move a URL in instance_data_dir to `url`, and split weighted crop_aspect_buckets into buckets and weights."""
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
    """Store of the text embeddings."""

    id: str = Field(min_length=1, max_length=100, description="Unique name.")
    type: Literal["local"] = Field("local", description="Kind of the store: a folder.")
    dataset_type: Literal["text_embeds"] = Field(
        "text_embeds", description="Marks an entry of text embeddings."
    )
    disabled: bool = Field(False, description="Ignore this entry.")
    default: bool = Field(
        False, description="Use for validation prompts, and for datasets without text_embeds."
    )
    cache_dir: Path | None = Field(None, description="Root of the store; not set: the storage resource's.")
    write_batch_size: Annotated[Count, Key(inherited="value")] = Field(
        128, description="Embeddings per file of the store."
    )
    text_cache_ondemand: Annotated[bool, Key(inherited="value")] = Field(
        False, description="Encode captions at first use in the training, and cache their embeddings."
    )
    text_cache_disable: Annotated[bool, Key(inherited="value")] = Field(
        False, description="Encode captions at each use, without a cache."
    )
    skip_file_discovery: str = Field("", description="`text`: the datasets' captions are not checked again.")
    caption_filter_list: Path | tuple[str, ...] | None = Field(
        None,
        description="Filters applied to every caption: a list, or a text or JSON file; a line is literal text, a regular expression, or s/find/replace/.",
    )

    @field_validator("skip_file_discovery", mode="before")
    @classmethod
    def _parse_stages(cls, value: Any) -> Any:
        return read_stages(value)

    @property
    def text_cache(self) -> CacheMode:
        """Return when captions are encoded, and whether their embeddings are cached."""
        return "disable" if self.text_cache_disable else "ondemand" if self.text_cache_ondemand else "full"


def asset_name(name: str) -> str:
    """Return `name` as a valid asset key and group: ASCII letters, digits and "_".

    Each other ASCII character becomes "_". A non-ASCII name is transliterated; since that is not injective, the digest of the name
    follows.
    """
    if name.isascii():
        return re.sub(r"[^A-Za-z0-9_]", "_", name)
    composed = unicodedata.normalize("NFC", name)  # macOS decomposes file names
    letters = re.sub(r"[^A-Za-z0-9_]+", "_", anyascii(composed)).strip("_")[:60]
    digest = hashlib.sha256(os.fsencode(composed)).hexdigest()
    return f"{letters or 'unnamed'}_{digest[:8]}"
