"""Names of remote files as names on this machine: none leads out of its folder, none is too long, no two are in each other's way."""

import hashlib
import re
from collections.abc import Iterable
from typing import Final

_LONGEST_COMPONENT: Final = 255 - 40
"""Bytes; what file systems allow, less room for the suffixes of temporary names."""
_LONGEST_PATH: Final = 3500


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
