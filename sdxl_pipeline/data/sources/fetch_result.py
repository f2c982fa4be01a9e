"""Result of fetching a dataset: its folder on this machine and what was downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.files.digest import digest_json

SOURCE_SETTINGS: Final = keys_used_by(ImageDataset, "source")
"""Settings that determine the origin of a dataset's images, except for a local folder."""


class SourceError(Exception):
    """A source that cannot be reached or read. The message has the dataset, the key, the value and a hint."""


@dataclass(frozen=True)
class FetchResult:
    """A dataset's images on this machine."""

    folder: Path
    captions: Mapping[str, tuple[str, ...]] | None = None
    """Captions by path within the folder, from a column of the source; None if the caption strategy reads files."""
    revision: str | None = None
    """Commit of a Hub repository, or digest of a list or of a bucket's listing; None for a local folder."""
    files: int = 0
    downloaded: int = 0
    downloaded_bytes: int = 0
    seconds: float = 0.0
    failed: tuple[tuple[str, str], ...] = ()
    """(name, reason) of each file that could not be fetched."""
    notes: tuple[str, ...] = ()
    """Sentences on unused content of the source's tables."""


def data_folder(dataset: ImageDataset, sources: Path) -> Path:
    """Return the folder of a dataset's images: its own, or one under `sources` whose name is derived from their origin."""
    if dataset.type == "local":
        if dataset.instance_data_dir is None:
            raise AssertionError("the settings validation requires instance_data_dir for a local dataset")
        return dataset.instance_data_dir
    identity = digest_json(dataset.model_dump(mode="json", include=SOURCE_SETTINGS))
    root = dataset.csv_cache_dir if dataset.type == "csv" and dataset.csv_cache_dir else sources
    return root / f"{dataset.asset_name}-{identity[:12]}" / "files"
