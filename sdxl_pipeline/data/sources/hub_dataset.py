"""Images from a dataset repository of the Hugging Face Hub: a folder of images, or Parquet files that hold them."""

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
from sdxl_pipeline.data.sources.fetch_result import Fetched, SourceError
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

_CONTENT: Final = "commit-"


def fetch_hub_dataset(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> Fetched:
    """Bring a split into the Hub's cache, and let `folder`/files be a link to what it holds at the repository's commit.

    The link is exchanged when everything of the commit is there. The images of an image folder are links into the cache; those of
    a Parquet file are written out once, and stay for later commits that have the same file. Where the Hub cannot be reached, the
    commit that was fetched last serves. Raises SourceError.
    """
    with DownloadCache(folder).opened() as cache, checked_connections(dataset):
        repository = _open(dataset, folder)
        about = _about(dataset, repository)
        files = files_of_split(dataset, repository.files, about)
        tables = [path for path in files if PurePosixPath(path).suffix.lower() in DATA_SUFFIXES]
        is_folder = any(hub_folder.is_image(path) for path in files)
        if not is_folder and not tables:
            suffixes = sorted({PurePosixPath(path).suffix or path for path in files})
            raise SourceError(
                f"{where(dataset)}: the split {dataset.split} holds neither images nor Parquet files, but {', '.join(suffixes)}. "
                "Write a dataset that is an image folder or Parquet; or download this one, and write type local."
            )
        wanted = hub_folder.needed(repository, files) if is_folder else tables
        missing = [path for path in wanted if not is_cached(repository, path)]
        local, failed = _download(repository, wanted, on_progress if is_folder else None)
        if not is_folder and failed:
            path, reason = next(iter(failed.items()))
            raise SourceError(
                f"{where(dataset)}: {len(failed)} of {len(tables)} Parquet files could not be downloaded, such as {path} ({reason}). Run again."
            )
        with cache.incoming() as content:
            content.mkdir()
            built = (
                hub_folder.build(dataset, repository, local, content)
                if is_folder
                else hub_parquet.build(dataset, repository, local, content, cache, on_progress)
            )
            _exchange(cache, content, repository)
        _clear_away(cache, built)
    came = [path for path in missing if path in local]
    return Fetched(
        cache.files,
        captions=built.captions,
        revision=repository.commit,
        files=built.files + len(failed),
        downloaded=sum(map(hub_folder.is_image, came)) + built.written,
        downloaded_bytes=sum(local[path].stat().st_size for path in came) + built.received,
        failed=tuple(sorted((failed | built.failed).items())),
        notes=tuple(built.notes),
    )


def _open(dataset: ImageDataset, folder: Path) -> HubRepository:
    record = folder / "repository.json"
    seen = None
    with suppress(FileNotFoundError, ValueError, TypeError):
        seen = HubRepository(**json.loads(record.read_text(encoding="utf-8")))
    try:
        repository = open_repository(dataset, seen)
    except HubUnreachableError as error:
        if seen is None:
            raise SourceError(
                f"{where(dataset)} cannot be reached, and nothing of it was fetched before ({error}). Connect once, or write type local."
            ) from error
        logger.info("%s is not reachable (%s): commit %s serves.", dataset.dataset_name, error, seen.commit)
        return seen
    if repository is not seen:
        write_text_atomic(record, json.dumps(asdict(repository)) + "\n")
    return repository


def _about(dataset: ImageDataset, repository: HubRepository) -> dict[str, Any]:
    """The metadata at the head of the repository's README; empty without one."""
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
        logger.warning("%s: the metadata of its %s is no YAML, and not read.", dataset.dataset_name, README)
        return {}


def _download(
    repository: HubRepository, wanted: Sequence[str], on_progress: Progress | None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Where each file lies in the cache, and why those that could not be had could not."""
    local: dict[str, Path] = {}

    def job(path: str) -> int:
        local[path] = download_file(repository, path)
        return 0

    jobs = {path: partial(job, path) for path in wanted}
    failed = fetch_all(jobs, on_progress, 0, len(jobs))[1]
    in_order = {path: local[path] for path in wanted if path in local}
    return in_order, {path: f"download failed: {reason}" for path, reason in failed.items()}


def _exchange(cache: DownloadCache, content: Path, repository: HubRepository) -> None:
    """Let `files` be a link to the content, under a name that tells the commit."""
    named = cache.folder / f"{_CONTENT}{repository.commit[:12]}-{secrets.token_hex(3)}"
    content.replace(named)
    with cache.incoming() as link:
        link.symlink_to(named, target_is_directory=True)
        link.replace(cache.files)


def _clear_away(cache: DownloadCache, built: Content) -> None:
    """Remove what only earlier commits had."""
    current = cache.files.resolve()
    for folder in cache.folder.glob(f"{_CONTENT}*"):
        if folder.resolve() != current:
            shutil.rmtree(folder)
    for shard in cache.folder.glob(f"{hub_parquet.SHARDS}/*"):
        if shard.name not in built.shards:
            shutil.rmtree(shard)
