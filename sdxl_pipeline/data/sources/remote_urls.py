"""Addresses of buckets and images: what they are of, and which optional package reads them."""

import importlib.util
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset

_READERS: Final = {
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""The package that reads a protocol through fsspec, and the extra of this project that installs it."""

STORES: Final = frozenset({"s3", "s3a", "gs", "gcs"})
"""Protocols of object stores, whose service is the user's choice, whatever an address says."""


def protocol_of(address: str) -> str:
    """The protocol of a URL in lower case; empty for a path."""
    protocol, separator, _ = address.partition("://")
    return protocol.lower() if separator else ""


def bucket_url(dataset: ImageDataset) -> str:
    """The URL of the folder that a dataset of type aws is read from, without a slash at its end."""
    if dataset.url is not None:
        return dataset.url.rstrip("/")
    prefix = (dataset.aws_data_prefix or "").strip("/")
    return f"s3://{dataset.aws_bucket_name}/{prefix}".rstrip("/")


def missing_extra(address: str) -> str:
    """What to install before this address can be read, as a sentence; empty when nothing is missing."""
    protocol = protocol_of(address)
    package, extra = _READERS.get(protocol, ("", ""))
    if not package or importlib.util.find_spec(package):
        return ""
    return (
        f"{protocol}:// needs the package {package}. Install the extra: pip install 'sdxl-pipeline[{extra}]'"
    )
