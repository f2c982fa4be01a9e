"""Frees what no project refers to, and says how much that is.

Of the stores, what no manifest of an existing project's dataset names and no running process uses. Beside them: the values and work of
projects and datasets that are gone, superseded tables, downloads that no dataset reads, and what killed processes left. What is younger
than an hour is left alone, since somebody may be about to refer to it.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_pipeline.cache.references import DATASET_STAGES, References, packed, references
from sdxl_pipeline.cache.store.compaction import Compaction, compact
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.files.atomic_files import unfinished
from sdxl_pipeline.files.storage_layout import StorageLayout

Progress = Callable[[str, int, int], None]

DAMAGED = "damaged entries"
YOUNG_SECONDS = 3600.0
ABANDONED_SECONDS = 7 * 24 * 3600.0
"""No stage runs longer; until then the spec of a run may still be that of one at work."""

_KEPT_TABLE = re.compile(r"(rows|captions|masks)-[0-9a-f]{16}\.parquet")
_OF_A_RUN = re.compile(r".+\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(spec|manifest(\.error)?)\.json")
_DOWNLOAD = re.compile(r".+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Freed:
    """Things of one kind that were freed, or would be."""

    what: str
    where: Path
    count: int
    bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What a prune freed, or, of a dry run, what it would free."""

    freed: tuple[Freed, ...]
    notes: tuple[str, ...]
    """What is kept against expectation, and why."""

    @property
    def bytes(self) -> int:
        """Bytes of disk, altogether."""
        return sum(item.bytes for item in self.freed)


def prune(
    root: Path,
    projects_folder: Path,
    *,
    dry_run: bool = False,
    verify: bool = False,
    on_progress: Progress | None = None,
) -> PruneReport:
    """Free what the projects in `projects_folder` do not refer to under the storage's `root`, and in stores of their own.

    With `verify`, every entry of the stores is read and compared with its checksum first; a damaged one is removed from the index, so
    that the next run encodes it again. `on_progress(what, done, total)` counts bytes, and entries while verifying. Raises PruneError when it cannot be told what is referred to; nothing is freed then.
    """
    places = StorageLayout(root)
    needed = references(places, projects_folder)
    freed: list[Freed] = []
    notes = list(needed.notes)
    for store in needed.keys:
        if verify:
            freed.append(Freed(DAMAGED, store, _verified(store, dry_run, on_progress), 0))
        if store in needed.kept_stores:
            notes.append(f"{store}: nothing is freed, since {needed.kept_stores[store]}")
            continue
        freed_there = _compacted(store, places, projects_folder, dry_run, on_progress)
        freed.append(Freed("entries", store, freed_there.entries, freed_there.bytes))
        if freed_there.kept_for:
            notes.append(f"{store}: entries in use are kept: {', '.join(freed_there.kept_for)}")
    before = time.time() - YOUNG_SECONDS
    for what, paths in (
        ("gone projects", _gone_projects(places, needed)),
        ("gone datasets", _gone_datasets(places, needed)),
        ("superseded tables", _superseded_tables(places, needed)),
        ("unfinished files", _unfinished(places, needed)),
        ("downloads", _downloads(places, needed)),
    ):
        by_folder: dict[Path, list[int]] = {}
        for path in paths:
            if _youngest(path) < before:
                by_folder.setdefault(path.parent, []).append(_size(path))
                if not dry_run:
                    _delete(path)
        freed += [Freed(what, folder, len(sizes), sum(sizes)) for folder, sizes in by_folder.items()]
    return PruneReport(tuple(item for item in freed if item.count or item.bytes), tuple(notes))


def _verified(root: Path, dry_run: bool, on_progress: Progress | None) -> int:
    """Return how many entries of a store are damaged; they are discarded unless it is a dry run."""
    store = TensorStore(root)

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(f"verify {root}", done, total)

    broken = store.damaged(on_progress=report)
    if broken and not dry_run:
        store.discard(broken)
    return len(broken)


def _compacted(
    store: Path, places: StorageLayout, projects_folder: Path, dry_run: bool, on_progress: Progress | None
) -> Compaction:
    def needed() -> np.ndarray | None:
        now = references(places, projects_folder)
        return None if store in now.kept_stores else packed(now.keys.get(store, []))

    def told(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(str(store), done, total)

    return compact(store, needed, dry_run=dry_run, on_progress=told)


def _gone_projects(places: StorageLayout, needed: References) -> Iterator[Path]:
    for folder in _folders(places.values):
        if folder.name not in needed.projects:
            yield folder
    for folder in _folders(places.work):
        # Other things than projects work there too; a dataset's stage shows what is one.
        dataset = any(any(folder.glob(f"*/{stage}")) for stage in DATASET_STAGES)
        if dataset and folder.name not in needed.projects:
            yield folder


def _gone_datasets(places: StorageLayout, needed: References) -> Iterator[Path]:
    for project in needed.projects:
        for folder in _folders(places.values / project):
            if not needed.has_dataset(project, folder.name):
                yield folder
        for folder in _folders(places.work / project):
            dataset = any((folder / stage).is_dir() for stage in DATASET_STAGES)
            if dataset and not needed.has_dataset(project, folder.name):
                yield folder


def _superseded_tables(places: StorageLayout, needed: References) -> Iterator[Path]:
    for project in needed.projects:
        for path in (places.work / project).rglob("*.parquet"):
            dataset = path.relative_to(places.work / project).parts[0]
            if (
                _KEPT_TABLE.fullmatch(path.name)
                and path.resolve() not in needed.files
                and needed.has_dataset(project, dataset)
            ):
                yield path


def _unfinished(places: StorageLayout, needed: References) -> Iterator[Path]:
    """What killed processes left: files written beside their target, and what a stage's launcher names after its run."""
    for folder in (places.values, places.work, *needed.outputs):
        yield from unfinished(folder)
    for folder in needed.outputs:
        # The release that a newer one was about to replace is the only one until that has its name.
        yield from (path for path in folder.glob(".release.*.old") if (folder / "release").is_dir())
    before = time.time() - ABANDONED_SECONDS
    for path in places.work.rglob("*.json"):
        if _OF_A_RUN.fullmatch(path.name) and _youngest(path) < before:
            yield path


def _downloads(places: StorageLayout, needed: References) -> Iterator[Path]:
    if needed.sources is None:
        return
    for folder in _folders(places.sources):
        if _DOWNLOAD.fullmatch(folder.name) and folder not in needed.sources:
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


def _youngest(path: Path) -> float:
    """When something was last written there."""
    return max((file.lstat().st_mtime for file in (path, *_files(path))), default=0.0)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
