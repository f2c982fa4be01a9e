"""Which files of a dataset repository are of which split, as the Hub's own conventions have it."""

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
"""A split's name in that of a shard, as `datasets` writes them."""


def files_of_split(dataset: ImageDataset, files: Iterable[str], about: Mapping[str, Any]) -> list[str]:
    """The paths of the dataset's configuration and split, sorted; `about` is the metadata at the head of the repository's README.

    In this order: the `configs` of that metadata; the names of shards (`data/train-00000-of-00002.parquet`); folders or files called
    after a split (`train/`, `val.parquet`); else every file is of the split `train`. A configuration that the metadata does not name
    is a folder. Raises SourceError when there is no such configuration or split.
    """
    files = sorted(path for path in files if not _is_apart(path))
    splits = _declared(dataset, files, about)
    if splits is None:
        splits = _conventional(_in_config_folder(dataset, files))
    splits = {split: paths for split, paths in splits.items() if paths}
    if dataset.split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise SourceError(
            f"{where(dataset, 'split')}: {dataset.dataset_name} has no such split; it has {known}. Write one of them in split."
        )
    return splits[dataset.split]


def _is_apart(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(part.startswith((".", "__")) for part in parts) or path == README


def _declared(
    dataset: ImageDataset, files: list[str], about: Mapping[str, Any]
) -> dict[str, list[str]] | None:
    """The splits of the configuration that the metadata declares; None when it declares no data files."""
    configs = about.get("configs")
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
        return _conventional(inside) if root else None
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
    wanted = dataset.dataset_config
    if wanted is None or wanted == "default":
        return files
    inside = [path for path in files if wanted in PurePosixPath(path).parts[:-1]]
    if not inside:
        folders = sorted({PurePosixPath(path).parts[0] for path in files if "/" in path})
        raise SourceError(
            f"{where(dataset, 'dataset_config')}: {dataset.dataset_name} has no such configuration; it has the folders "
            f"{', '.join(folders) or '(none)'}. Leave dataset_config out, or write one of them."
        )
    return inside


def _conventional(files: list[str]) -> dict[str, list[str]]:
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
        if split := next((split for folder in folders if (split := _split_called(folder))), None):
            by_folder.setdefault(split, []).append(path)
        elif PurePosixPath(name).suffix in DATA_SUFFIXES and (
            split := _split_called(PurePosixPath(name).stem)
        ):
            by_name.setdefault(split, []).append(path)
    return by_folder or by_name or {"train": files}


def _split_called(name: str) -> str | None:
    """The split that a folder or file is called after; its name may go on after something that is no letter."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    return next(
        (split for split, keywords in _KEYWORDS.items() if any(word in keywords for word in words)), None
    )
