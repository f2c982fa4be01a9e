"""Images from a dataset repository of the Hugging Face Hub: an image folder or Parquet files."""

import json
import logging
import secrets
import shutil
from collections.abc import Sequence
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
from sdxl_pipeline.data.sources.hub_splits import DATA_SUFFIXES, README, files_of_split
from sdxl_pipeline.files.atomic_files import write_text_atomic

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
