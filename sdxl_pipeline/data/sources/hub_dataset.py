"""Images from a dataset repository of the Hugging Face Hub: an image folder or Parquet files."""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources import hub_folder, hub_parquet
from sdxl_pipeline.data.sources.download import DownloadCache, FetchError, Progress, fetch_all, retry
from sdxl_pipeline.data.sources.fetch_result import FetchResult, SourceError
from sdxl_pipeline.data.sources.hub_files import (
    Content,
    HubRepository,
    HubUnreachableError,
    checked_connections,
    download_file,
    is_cached,
    open_repository,
    where,
)
from sdxl_pipeline.files.atomic_files import write_text_atomic

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


logger = logging.getLogger(__name__)

_CONTENT_PREFIX: Final = "commit-"


def fetch_hub_dataset(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> FetchResult:
    """Download a split into the Hub cache, and make `folder`/files a link to its content at the repository's commit.

    The link is replaced when the commit is complete. The images of an image folder are links into the cache; those of a Parquet file
    are extracted once, and reused for later commits with the same file. If the Hub cannot be reached, the last fetched commit is used.
    Raises SourceError if the repository, the split or its content cannot be used.
    """
    with DownloadCache(folder).locked() as cache, checked_connections(dataset):
        repository = _open(dataset, folder)
        metadata = _readme_metadata(dataset, repository)
        files = files_of_split(dataset, repository.files, metadata)
        tables = [path for path in files if PurePosixPath(path).suffix.lower() in DATA_SUFFIXES]
        is_folder = any(hub_folder.is_image(path) for path in files)
        if not is_folder and not tables:
            suffixes = sorted({PurePosixPath(path).suffix or path for path in files})
            raise SourceError(
                f"{where(dataset)}: the split {dataset.split} has neither images nor Parquet files, but {', '.join(suffixes)}. "
                "Use a dataset that is an image folder or Parquet, or download this one and write type local."
            )
        required = hub_folder.required_files(repository, files) if is_folder else tables
        missing = [path for path in required if not is_cached(repository, path)]
        local, failed = _download(repository, required, on_progress if is_folder else None)
        if not is_folder and failed:
            path, reason = next(iter(failed.items()))
            raise SourceError(
                f"{where(dataset)}: {len(failed)} of {len(tables)} Parquet files could not be downloaded, such as {path} ({reason}). Run again."
            )
        with cache.temporary_path() as content:
            content.mkdir()
            built = (
                hub_folder.build_content(dataset, repository, local, content)
                if is_folder
                else hub_parquet.build_content(dataset, repository, local, content, cache, on_progress)
            )
            _replace_link(cache, content, repository)
        _remove_stale(cache, built)
    new_downloads = [path for path in missing if path in local]
    return FetchResult(
        cache.files,
        captions=built.captions,
        revision=repository.commit,
        files=built.files + len(failed),
        downloaded=sum(map(hub_folder.is_image, new_downloads)) + built.written,
        downloaded_bytes=sum(local[path].stat().st_size for path in new_downloads) + built.received,
        failed=tuple(sorted((failed | built.failed).items())),
        notes=tuple(built.notes),
    )


def _open(dataset: ImageDataset, folder: Path) -> HubRepository:
    record = folder / "repository.json"
    previous = None
    with suppress(FileNotFoundError, ValueError, TypeError):
        previous = HubRepository(**json.loads(record.read_text(encoding="utf-8")))
    try:
        repository = open_repository(dataset, previous)
    except HubUnreachableError as error:
        if previous is None:
            raise SourceError(
                f"{where(dataset)} cannot be reached, and no commit of it was fetched before ({error}). Connect once, or write type local."
            ) from error
        logger.info(
            "%s is not reachable (%s): using commit %s.", dataset.dataset_name, error, previous.commit
        )
        return previous
    if repository is not previous:
        write_text_atomic(record, json.dumps(asdict(repository)) + "\n")
    return repository


def _readme_metadata(dataset: ImageDataset, repository: HubRepository) -> dict[str, Any]:
    """Return the metadata block of the repository's README; empty if there is none."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if README not in repository.files:
        return {}
    try:
        return metadata_load(retry(partial(download_file, repository, README))) or {}
    except FetchError as error:
        raise SourceError(
            f"{where(dataset)}: its {README} could not be downloaded ({error}). Run again."
        ) from error
    except (ValueError, yaml.YAMLError):
        logger.warning(
            "%s: the metadata of its %s is not valid YAML and is ignored.", dataset.dataset_name, README
        )
        return {}


def _download(
    repository: HubRepository, required: Sequence[str], on_progress: Progress | None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the path of each file in the cache, and the reason for each file that could not be downloaded."""
    local: dict[str, Path] = {}

    def job(path: str) -> int:
        local[path] = download_file(repository, path)
        return 0

    jobs = {path: partial(job, path) for path in required}
    failed = fetch_all(jobs, on_progress, 0, len(jobs))[1]
    in_order = {path: local[path] for path in required if path in local}
    return in_order, {path: f"download failed: {reason}" for path, reason in failed.items()}


def _replace_link(cache: DownloadCache, content: Path, repository: HubRepository) -> None:
    """Move the content to a folder named after the commit, and make `files` a link to it."""
    commit_folder = cache.folder / f"{_CONTENT_PREFIX}{repository.commit[:12]}-{secrets.token_hex(3)}"
    content.replace(commit_folder)
    with cache.temporary_path() as link:
        link.symlink_to(commit_folder, target_is_directory=True)
        link.replace(cache.files)


def _remove_stale(cache: DownloadCache, built: Content) -> None:
    """Remove the content of earlier commits."""
    current = cache.files.resolve()
    for folder in cache.folder.glob(f"{_CONTENT_PREFIX}*"):
        if folder.resolve() != current:
            shutil.rmtree(folder)
    for shard in cache.folder.glob(f"{hub_parquet.SHARDS}/*"):
        if shard.name not in built.shards:
            shutil.rmtree(shard)
