"""Files of each split of a dataset repository, by the conventions of the Hub."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.hub_files import where

README: Final = "README.md"
DATA_SUFFIXES: Final = frozenset({".parquet"})
_KEYWORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>[A-Za-z0-9_.]+)-\d{5}-of-\d{5}$")
"""File name of a shard as written by `datasets`, with the split."""


def files_of_split(dataset: ImageDataset, files: Iterable[str], metadata: Mapping[str, Any]) -> list[str]:
    """Return the sorted paths of the dataset's configuration and split; `metadata` is that of the repository's README.

    Splits are determined by, in this order: the `configs` of the metadata; names of shards (`data/train-00000-of-00002.parquet`);
    folders or files named after a split (`train/`, `val.parquet`); else every file is in the split `train`. A configuration that is not
    in the metadata is a folder. Raises SourceError if there is no such configuration or split.
    """
    files = sorted(path for path in files if not _is_ignored(path))
    splits = _declared_splits(dataset, files, metadata)
    if splits is None:
        splits = _splits_by_convention(_in_config_folder(dataset, files))
    splits = {split: paths for split, paths in splits.items() if paths}
    if dataset.split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise SourceError(
            f"{where(dataset, 'split')}: {dataset.dataset_name} has no such split; it has {known}. Write one of them in split."
        )
    return splits[dataset.split]


def _is_ignored(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(part.startswith((".", "__")) for part in parts) or path == README


def _declared_splits(
    dataset: ImageDataset, files: list[str], metadata: Mapping[str, Any]
) -> dict[str, list[str]] | None:
    """Return the paths by split of the configuration in the metadata; None if it declares no data files."""
    configs = metadata.get("configs")
    configs = configs if isinstance(configs, list) else [configs]
    configs = [config for config in configs if isinstance(config, Mapping)]
    if not configs:
        return None
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if dataset.dataset_config is not None and dataset.dataset_config not in by_name:
        raise SourceError(
            f"{where(dataset, 'dataset_config')}: {dataset.dataset_name} has no such configuration; it has {', '.join(by_name)}. "
            "Write one of them in dataset_config."
        )
    marked = [name for name, config in by_name.items() if config.get("default")]
    name = dataset.dataset_config or next(iter([*marked, *(n for n in by_name if n == "default"), *by_name]))
    config = by_name[name]
    root = str(config.get("data_dir") or "").strip("/")
    declared = config.get("data_files")
    if declared is None:
        inside = [path for path in files if not root or path.startswith(root + "/")]
        return _splits_by_convention(inside) if root else None
    if isinstance(declared, Mapping):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    elif isinstance(declared, str):
        declared = [{"split": "train", "path": declared}]
    splits: dict[str, list[str]] = {}
    for entry in declared if isinstance(declared, list) else []:
        entry = entry if isinstance(entry, Mapping) else {"split": "train", "path": entry}
        patterns = entry.get("path") or []
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            full = f"{root}/{pattern}" if root else str(pattern)
            found = splits.setdefault(str(entry.get("split", "train")), [])
            found += [path for path in _matching(files, full) if path not in set(found)]
    return splits


def _matching(files: list[str], pattern: str) -> list[str]:
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern.removeprefix("./"))).match
    return [path for path in files if matches(path)]


def _in_config_folder(dataset: ImageDataset, files: list[str]) -> list[str]:
    config_name = dataset.dataset_config
    if config_name is None or config_name == "default":
        return files
    inside = [path for path in files if config_name in PurePosixPath(path).parts[:-1]]
    if not inside:
        folders = sorted({PurePosixPath(path).parts[0] for path in files if "/" in path})
        raise SourceError(
            f"{where(dataset, 'dataset_config')}: {dataset.dataset_name} has no such configuration; it has the folders "
            f"{', '.join(folders) or '(none)'}. Leave dataset_config out, or write one of them."
        )
    return inside


def _splits_by_convention(files: list[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for path in files:
        if found := _SHARD.search(PurePosixPath(path).stem):
            shards.setdefault(found["split"], []).append(path)
    if shards:
        return shards
    by_folder: dict[str, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for path in files:
        *folders, name = PurePosixPath(path).parts
        if split := next((split for folder in folders if (split := _split_of_name(folder))), None):
            by_folder.setdefault(split, []).append(path)
        elif PurePosixPath(name).suffix in DATA_SUFFIXES and (
            split := _split_of_name(PurePosixPath(name).stem)
        ):
            by_name.setdefault(split, []).append(path)
    return by_folder or by_name or {"train": files}


def _split_of_name(name: str) -> str | None:
    """Return the split in the name of a folder or file, which may contain further words separated by non-letters; None if none."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    return next(
        (split for split, keywords in _KEYWORDS.items() if any(word in keywords for word in words)), None
    )
