"""What every source gives: a folder, and what is known of how it was filled."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.files.digest import digest_json

SOURCE_SETTINGS: Final = keys_used_by(ImageDataset, "source")
"""The settings that say where a dataset's images come from, its own folder apart."""


class SourceError(Exception):
    """A source that cannot be reached or read at all. The message names the dataset, the key, the value and the remedy."""


@dataclass(frozen=True)
class Fetched:
    """A dataset's images on this machine."""

    folder: Path
    captions: Mapping[str, tuple[str, ...]] | None = None
    """Captions by path within the folder, from a column of the source; None: the caption strategy reads files."""
    revision: str | None = None
    """What was read: a commit of a Hub repository, the digest of a list or of a bucket's listing; None for a local folder."""
    files: int = 0
    downloaded: int = 0
    downloaded_bytes: int = 0
    seconds: float = 0.0
    failed: tuple[tuple[str, str], ...] = ()
    """(name, reason) of everything that could not be fetched."""
    notes: tuple[str, ...] = ()
    """Sentences on what the source's tables hold that is not used."""


def data_folder(dataset: ImageDataset, sources: Path) -> Path:
    """Where a dataset's images lie: its own folder, or one under `sources` that is named after where they come from."""
    if dataset.type == "local":
        if dataset.instance_data_dir is None:
            raise AssertionError("a local dataset without folder passes no check of the settings")
        return dataset.instance_data_dir
    identity = digest_json(dataset.model_dump(mode="json", include=SOURCE_SETTINGS))
    root = dataset.csv_cache_dir if dataset.type == "csv" and dataset.csv_cache_dir else sources
    return root / f"{dataset.asset_name}-{identity[:12]}" / "files"
