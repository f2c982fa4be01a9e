"""Remote URLs: their protocol, the optional package that reads them, and the local file names of what they point to."""

import hashlib
import importlib.util
import re
from collections.abc import Iterable
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
"""Protocols of object stores, whose endpoint is configured by the user rather than by the URL."""

_MAX_COMPONENT_BYTES: Final = 255 - 40
"""Limit of file systems minus the suffixes of temporary names."""
_MAX_PATH_BYTES: Final = 3500


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in lower case; "" for a path."""
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator else ""


def bucket_url(dataset: ImageDataset) -> str:
    """Return the URL of the folder of a dataset of type aws, without a trailing slash."""
    if dataset.url is not None:
        return dataset.url.rstrip("/")
    prefix = (dataset.aws_data_prefix or "").strip("/")
    return f"s3://{dataset.aws_bucket_name}/{prefix}".rstrip("/")


def missing_extra(url: str) -> str:
    """Return a sentence on the extra to install for this URL; "" if nothing is missing."""
    protocol = protocol_of(url)
    package, extra = _READERS.get(protocol, ("", ""))
    if not package or importlib.util.find_spec(package):
        return ""
    return (
        f"{protocol}:// needs the package {package}. Install the extra: pip install 'sdxl-pipeline[{extra}]'"
    )


def invalid_name_reason(name: str) -> str:
    """Return the reason why a remote name, with forward slashes, cannot be a relative path on this machine; "" if it can."""
    parts = name.split("/")
    if name.startswith("/"):
        return "the name is absolute"
    if ".." in parts or "." in parts:
        return "the name leads to another folder"
    if "" in parts:
        return "the name contains an empty folder"
    if "\0" in name:
        return "the name contains a null byte"
    component_bytes = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    if max(component_bytes) > _MAX_COMPONENT_BYTES or sum(component_bytes) + len(parts) > _MAX_PATH_BYTES:
        return "the name is too long"
    return ""


def names_used_as_folders(names: Iterable[str]) -> set[str]:
    """Return the names that others use as a folder: a bucket may have both `a` and `a/b.png`, a file system cannot."""
    names = set(names)
    folders = {
        "/".join(parts[:depth])
        for parts in (name.split("/") for name in names)
        for depth in range(1, len(parts))
    }
    return names & folders


def name_for_url(url: str, suffix: str) -> str:
    """Return a unique file name for a URL: a readable part of it and a digest."""
    file_name = re.split(r"[?#]", url, maxsplit=1)[0].rstrip("/").rsplit("/", 1)[-1]
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", file_name.rsplit(".", 1)[0]).strip("-")[:40]
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:20]
    return f"{stem}-{digest}{suffix}" if stem else digest + suffix
