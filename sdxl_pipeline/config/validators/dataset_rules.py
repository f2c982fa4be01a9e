"""Invalid combinations of the settings of an image dataset."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from sdxl_pipeline.config.credentials import has_credentials
from sdxl_pipeline.config.schema.datasets import SKIPPABLE_STAGES, ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_with


class Finding(NamedTuple):
    """An invalid combination of settings: the key to change, the reason, and what to write instead."""

    key: str
    message: str
    hint: str


def check_images(dataset: ImageDataset) -> Iterator[Finding]:
    """Yield invalid combinations of settings in one image dataset."""
    yield from _check_source(dataset)
    yield from _check_sizes(dataset)
    yield from _check_crops(dataset)
    least, most = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if least is not None and most is not None and least > most:
        yield Finding(
            "minimum_aspect_ratio",
            f"is above maximum_aspect_ratio ({most:g}), so every image would be dropped",
            "swap the two",
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
            "write the prompt for these images",
        )
    words = re.split(r"[\s,]+", dataset.skip_file_discovery.strip())
    unknown = [word for word in words if word and word not in SKIPPABLE_STAGES]
    if unknown:
        yield Finding(
            "skip_file_discovery",
            f"contains unknown stages: {', '.join(unknown)}",
            f"write any of {', '.join(SKIPPABLE_STAGES)}",
        )


def _check_source(dataset: ImageDataset) -> Iterator[Finding]:
    """Check that the keys which the source's type and the caption strategy need are set."""
    needed = {
        "local": ("instance_data_dir", "write the path of the folder of the images"),
        "huggingface": ("dataset_name", "write the dataset's repository, owner/name"),
        "aws": ("aws_bucket_name", "write the bucket's name, or a URL such as s3://bucket/photos in url"),
        "csv": ("csv_file", "write the path of the list"),
    }
    key, hint = needed[dataset.type]
    if getattr(dataset, key) is None and not (dataset.type in ("aws", "local") and dataset.url):
        yield Finding(key, f"is missing, and type {dataset.type} needs it", hint)
    yield from _check_addresses(dataset)
    if dataset.url is not None and dataset.type != "aws":
        yield Finding(
            "url", f"is a URL, and type is {dataset.type}", 'write "type": "aws", which reads any fsspec URL'
        )
    strategy = dataset.caption_strategy
    if strategy in ("csv", "huggingface") and dataset.type != strategy:
        yield Finding(
            "caption_strategy",
            f"{strategy} needs a dataset of type {strategy}, but type is {dataset.type}",
            "write filename, textfile, instanceprompt or parquet",
        )
    if strategy == "parquet" and dataset.parquet is None:
        yield Finding(
            "parquet",
            "is missing, and caption_strategy parquet needs it",
            'write {"path": "captions.parquet", "filename_column": "filename", "caption_column": "caption"}',
        )


def _check_addresses(dataset: ImageDataset) -> Iterator[Finding]:
    for key in ("url", "aws_endpoint_url"):
        address = getattr(dataset, key)
        if address is not None and has_credentials(address):
            yield Finding(
                key,
                "contains a user name, a password or a query string, which would be recorded with the URL",
                "write the URL without them; credentials are read from the environment, or from aws_access_key_id and aws_secret_access_key",
            )
    if dataset.url is not None and "://" not in dataset.url:
        yield Finding("url", "has no protocol", "write a URL such as s3://bucket/photos")
    if dataset.aws_bucket_name is not None and dataset.url is not None:
        yield Finding("url", "is given together with aws_bucket_name", "keep one of the two")
    if (dataset.aws_access_key_id is None) != (dataset.aws_secret_access_key is None):
        missing = "aws_access_key_id" if dataset.aws_access_key_id is None else "aws_secret_access_key"
        yield Finding(
            missing,
            "is missing, but the other part of the key is set",
            "set both, or both in the environment",
        )


def _check_crops(dataset: ImageDataset) -> Iterator[Finding]:
    if dataset.crop and dataset.crop_aspect in ("closest", "random") and not dataset.crop_aspect_buckets:
        yield Finding(
            "crop_aspect_buckets",
            f"is missing, and crop_aspect {dataset.crop_aspect} needs it",
            "write aspect ratios (width / height), such as [1.0, 0.75, 1.5]",
        )
    if dataset.crop_aspect_weights and len(dataset.crop_aspect_weights) != len(dataset.crop_aspect_buckets):
        yield Finding(
            "crop_aspect_weights",
            f"has {len(dataset.crop_aspect_weights)} weights for {len(dataset.crop_aspect_buckets)} aspect ratios",
            "write one weight for each entry of crop_aspect_buckets",
        )
    if dataset.crops_per_image > 1 and dataset.vae_cache_clear_each_epoch:
        yield Finding(
            "crops_per_image",
            "is given together with vae_cache_clear_each_epoch, which computes a new crop in every epoch",
            "keep one of the two",
        )


def _check_sizes(dataset: ImageDataset) -> Iterator[Finding]:
    sizes = {
        key: getattr(dataset, key) for key in keys_with(ImageDataset, lambda key: key.inherited == "size")
    }
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
            f"is above maximum_image_size ({maximum:g}), so large images would be enlarged",
            f"write at most {maximum:g}",
        )
