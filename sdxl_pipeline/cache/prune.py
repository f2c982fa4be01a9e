"""Deletion of unreferenced files under the storage root, with a report of the freed bytes.

Covers store entries that no manifest of an existing project's dataset references and no running process uses; values and work of deleted
projects and datasets; superseded values and tables; downloads that no dataset reads; and leftovers of killed processes. Anything younger than an
hour is retained, since it may be about to be referenced.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_pipeline.cache.references import (
    DATASET_STAGES,
    References,
    concatenate_keys,
    dataset_of,
    references,
)
from sdxl_pipeline.cache.store.compaction import Compaction, compact
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.files.atomic_files import find_unfinished
from sdxl_pipeline.files.storage_layout import StorageLayout

Progress = Callable[[str, int, int], None]

CORRUPT_ENTRIES = "corrupt entries"
MIN_AGE_SECONDS = 3600.0
ABANDONED_SECONDS = 7 * 24 * 3600.0
"""Longer than any stage runs; until then a run's spec may belong to a running stage."""

_TABLE = re.compile(r"(rows|captions|masks)-[0-9a-f]{16}\.parquet")
_RUN_FILE = re.compile(r".+\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(spec|manifest(\.error)?)\.json")
_DOWNLOAD = re.compile(r".+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Freed:
    """Items of one kind that were freed, or would be in a dry run."""

    what: str
    where: Path
    count: int
    bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What a prune freed, or would free in a dry run."""

    freed: tuple[Freed, ...]
    notes: tuple[str, ...]
    """Unreferenced items that were retained, and why."""

    @property
    def bytes(self) -> int:
        """Total bytes on disk."""
        return sum(item.bytes for item in self.freed)


def prune(
    root: Path,
    projects_folder: Path,
    *,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress | None = None,
) -> PruneReport:
    """Delete what the projects in `projects_folder` do not reference under the storage `root`, and in their own stores.

    With `verify`, the checksum of every store entry is verified first; corrupt entries are removed from the index, so that the next run
    encodes them again. `on_progress(what, done, total)` counts bytes, and entries while verifying. Raises PruneError when the references
    cannot be determined; nothing is deleted then.
    """
    layout = StorageLayout(root)
    referenced = references(layout, projects_folder)
    freed: list[Freed] = []
    notes = list(referenced.notes)
    for store in referenced.keys:
        if verify:
            freed.append(Freed(CORRUPT_ENTRIES, store, _verify(store, dry_run, on_progress), 0))
        if store in referenced.retained_stores:
            notes.append(f"{store}: nothing is freed: {referenced.retained_stores[store]}")
            continue
        compaction = _compact(store, layout, projects_folder, dry_run, on_progress)
        freed.append(Freed("entries", store, compaction.entries, compaction.bytes))
        if compaction.retained_for:
            notes.append(f"{store}: entries in use are retained: {', '.join(compaction.retained_for)}")
    before = time.time() - MIN_AGE_SECONDS
    for what, paths in (
        ("deleted projects", _deleted_projects(layout, referenced)),
        ("deleted datasets", _deleted_datasets(layout, referenced)),
        ("superseded values", _superseded_values(layout, referenced)),
        ("superseded tables", _superseded_tables(layout, referenced)),
        ("unfinished files", _unfinished(layout, referenced)),
        ("downloads", _downloads(layout, referenced)),
    ):
        by_folder: dict[Path, list[int]] = {}
        for path in paths:
            if _last_modified(path) < before:
                by_folder.setdefault(path.parent, []).append(_size(path))
                if not dry_run:
                    _delete(path)
        freed += [Freed(what, folder, len(sizes), sum(sizes)) for folder, sizes in by_folder.items()]
    return PruneReport(tuple(item for item in freed if item.count or item.bytes), tuple(notes))


def _verify(root: Path, dry_run: bool, on_progress: Progress | None) -> int:
    """Return the number of corrupt entries of a store; they are discarded unless it is a dry run."""
    store = TensorStore(root)

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"verify {root}", done, total)

    corrupt = store.corrupt_keys(on_progress=report)
    if corrupt and not dry_run:
        store.discard(corrupt)
    return len(corrupt)


def _compact(
    store: Path, layout: StorageLayout, projects_folder: Path, dry_run: bool, on_progress: Progress | None
) -> Compaction:
    def referenced() -> np.ndarray | None:
        current = references(layout, projects_folder)
        return None if store in current.retained_stores else concatenate_keys(current.keys.get(store, []))

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(str(store), done, total)

    return compact(store, referenced, dry_run=dry_run, on_progress=report)


def _deleted_projects(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    for folder in _folders(layout.values):
        if folder.name not in referenced.projects:
            yield folder
    for folder in _folders(layout.work):
        # `work` has other folders as well; a project has dataset stages.
        dataset = any(any(folder.glob(f"*/{stage}")) for stage in DATASET_STAGES)
        if dataset and folder.name not in referenced.projects:
            yield folder


def _deleted_datasets(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    for project in referenced.projects:
        for value in (layout.values / project).glob("[!.]*"):
            dataset = dataset_of(value)
            if dataset is not None and not referenced.has_dataset(project, dataset):
                yield value
        for folder in _folders(layout.work / project):
            has_stages = any((folder / stage).is_dir() for stage in DATASET_STAGES)
            if has_stages and not referenced.has_dataset(project, folder.name):
                yield folder


def _superseded_values(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    """Yield the values of earlier versions, in which a dataset was a component of its assets' keys and so a folder."""
    for project, datasets in referenced.projects.items():
        if datasets is not None:
            yield from _folders(layout.values / project)


def _superseded_tables(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    for project in referenced.projects:
        for path in (layout.work / project).rglob("*.parquet"):
            dataset = path.relative_to(layout.work / project).parts[0]
            if (
                _TABLE.fullmatch(path.name)
                and path.resolve() not in referenced.files
                and referenced.has_dataset(project, dataset)
            ):
                yield path


def _unfinished(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    """Yield leftovers of killed processes: temporary files, and the specs and manifests of a stage's runs."""
    for folder in (layout.values, layout.work, *referenced.outputs):
        yield from find_unfinished(folder)
    for folder in referenced.outputs:
        # Until a release is complete, the one it replaces is the only copy.
        yield from (path for path in folder.glob(".release.*.old") if (folder / "release").is_dir())
    before = time.time() - ABANDONED_SECONDS
    for path in layout.work.rglob("*.json"):
        if _RUN_FILE.fullmatch(path.name) and _last_modified(path) < before:
            yield path


def _downloads(layout: StorageLayout, referenced: References) -> Iterator[Path]:
    if referenced.sources is None:
        return
    for folder in _folders(layout.sources):
        if _DOWNLOAD.fullmatch(folder.name) and folder not in referenced.sources:
            yield folder


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield path


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    else:
        yield path


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in _files(path))


def _last_modified(path: Path) -> float:
    """Return the latest modification time in a file or folder."""
    return max((file.lstat().st_mtime for file in (path, *_files(path))), default=0.0)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
