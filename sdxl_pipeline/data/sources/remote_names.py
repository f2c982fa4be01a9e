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
"""Protocols of object stores, whose service is the user's choice, whatever an address says."""

_LONGEST_COMPONENT: Final = 255 - 40
"""Bytes; what file systems allow, less room for the suffixes of temporary names."""
_LONGEST_PATH: Final = 3500


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


def why_not_local(name: str) -> str:
    """Why a remote name, with forward slashes, cannot be a path within a folder of this machine; empty when it can."""
    parts = name.split("/")
    if name.startswith("/"):
        return "the name is absolute"
    if ".." in parts or "." in parts:
        return "the name leads to another folder"
    if "" in parts:
        return "the name has an empty folder in it"
    if "\0" in name:
        return "the name has a null byte in it"
    encoded = [len(part.encode("utf-8", "surrogatepass")) for part in parts]
    if max(encoded) > _LONGEST_COMPONENT or sum(encoded) + len(parts) > _LONGEST_PATH:
        return "the name is too long"
    return ""


def names_in_the_way(names: Iterable[str]) -> set[str]:
    """Those names that others use as a folder: a bucket may hold both `a` and `a/b.png`, a file system cannot."""
    names = set(names)
    folders = {
        "/".join(parts[:depth])
        for parts in (name.split("/") for name in names)
        for depth in range(1, len(parts))
    }
    return names & folders


def name_of_address(address: str, suffix: str) -> str:
    """A file name that is the address's own: what a person recognizes of it, and a digest of the whole."""
    last = re.split(r"[?#]", address, maxsplit=1)[0].rstrip("/").rsplit("/", 1)[-1]
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", last.rsplit(".", 1)[0]).strip("-")[:40]
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:20]
    return f"{stem}-{digest}{suffix}" if stem else digest + suffix
