"""Files of a store: paths, locking, index merging and orphan collection. See `TensorStore` for the entries.

<root>/shards/<name>.safetensors    some entries
<root>/index/<name>.parquet         index of one new shard
<root>/index.parquet                merged index of all older shards
<root>/leases/<name>.lease          entries that a living process reads or writes
<root>/.lock                        held while the index or the leases change
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import lock_descriptor

from sdxl_pipeline.cache.store.leases import hold_lease, live_leases, oldest_writer_ns
from sdxl_pipeline.cache.store.shards import MappedShard, ShardError
from sdxl_pipeline.cache.store.store_index import (
    Index,
    IndexFileError,
    merge_indices,
    pack_keys,
    read_index,
    write_index,
)
from sdxl_pipeline.files.disk_space import DiskFullError, disk_full_message
from sdxl_pipeline.files.storage_errors import StorageError, ignore_full_disk

# Far longer than a writer takes between writing a shard and its index part.
ORPHAN_AGE_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class StoreFolder:
    """Files of the store at `root`, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = root / "shards"
        self.parts = root / "index"
        self.index_path = root / "index.parquet"
        self.leases = root / "leases"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's exclusive lock; the operating system releases it when this process ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            lock_descriptor(file.fileno(), poll_interval=0.01)
            yield

    def lease(
        self, keys: Iterable[str], *, purpose: str, writes: bool = False
    ) -> AbstractContextManager[None]:
        """Protect these entries, existing and future, from being pruned while the block runs.

        An index that is read in the block stays valid until its end; the lease ends with the process. `purpose` is displayed when a prune
        retains the entries. With `writes`, nothing that was written since the block started is pruned.
        """
        try:
            packed = pack_keys(list(dict.fromkeys(keys)))
        except ValueError as error:
            raise StorageError(str(error)) from error
        return hold_lease(self.leases, self.locked(), packed, purpose=purpose, writes=writes)

    def part_paths(self) -> list[Path]:
        """Return the index parts that are not merged yet."""
        return sorted(self.parts.glob("[!.]*.parquet"))

    def shard_sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file in the shards folder, by name."""
        sizes: dict[str, int] = {}
        if self.shards.is_dir():
            with os.scandir(self.shards) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with suppress(FileNotFoundError):  # deleted by another process meanwhile
                            sizes[entry.name] = entry.stat().st_size
        return sizes

    def read_index(self) -> Index:
        """Return every entry that is stored in a complete shard. A corrupt index file is rebuilt from the shards."""
        # Parts first: one that vanishes between listing and reading has been merged into the index that is read afterwards.
        corrupt: list[Path] = []
        parts = [self._read_or_delete(part, corrupt) for part in self.part_paths()]
        main_index = self._read_or_delete(self.index_path, corrupt)
        sizes = self.shard_sizes()  # after the indices, since a shard exists before its rows
        indices = [index for index in (main_index, *parts) if index is not None]
        if main_index is None or corrupt:  # the shards hold the keys of their entries
            indexed = {name for index in indices for name in index.shards}
            indices += self._indices_of(sizes.keys() - indexed, sizes)
        # Before merging: of two locations of an entry, the one in a complete shard counts.
        return merge_indices(index.with_complete_shards(sizes) for index in indices)

    def _read_or_delete(self, path: Path, corrupt: list[Path]) -> Index | None:
        """Return an index file's content. A corrupt one is deleted: the shards hold the same rows."""
        try:
            return read_index(path)
        except IndexFileError as error:
            _log.warning("%s. It is deleted and rebuilt from the shards.", error)
            corrupt.append(path)
            with suppress(OSError):  # in a read-only store it is treated as absent
                path.unlink()
            return None

    def rebuild_index(self) -> Index:
        """Rewrite index.parquet from the shards alone and return it. Reads every entry, and omits corrupt ones."""
        with self.locked():
            parts = self.part_paths()
            sizes = self.shard_sizes()
            index = merge_indices(self._indices_of(sizes, sizes))
            with ignore_full_disk():
                self.write_index(index, parts)
        return index

    def discard(self, keys: np.ndarray) -> None:
        """Remove packed keys from the index, so that their entries count as missing. Their shards stay until pruned."""
        with self.locked():
            parts = self.part_paths()
            index = self.read_index()
            positions = index.find(keys)
            retained = np.ones(len(index), bool)
            retained[positions[positions >= 0]] = False
            self.write_index(index.select(retained), parts)

    def write_index(self, index: Index, merged_parts: Iterable[Path]) -> None:
        """Replace index.parquet by `index` and delete the `merged_parts`. The lock is held."""
        write_index(self.index_path, index)
        for part in merged_parts:
            part.unlink(missing_ok=True)

    def merge_index(self) -> None:
        """Merge the parts into index.parquet, add shards that are in no index, and collect orphans.

        Nothing is lost when the disk is too full for the new index: the parts stay, and are read as they are.
        """
        if not self.shards.is_dir():
            return
        with ignore_full_disk(), self.locked():
            parts = self.part_paths()
            index = self.read_index()
            sizes = self.shard_sizes()
            orphans = sizes.keys() - set(index.shards)
            if parts or orphans or not self.index_path.exists():
                index = merge_indices([index, *self._indices_of(orphans, sizes)])
                self.write_index(index, parts)
            self.collect_orphans(index)

    def collect_orphans(self, index: Index, dry_run: bool = False) -> int:
        """Delete leftovers of killed writers and return their bytes. The lock is held.

        Deletes unfinished files, and shards without entries in `index`, if they are older than an hour and older than the oldest active
        writer.
        """
        used = {index.shards[code] for code in np.unique(index.shard).tolist()}
        before = time.time_ns() - int(ORPHAN_AGE_SECONDS * 1e9)
        before = min(before, oldest_writer_ns(live_leases(self.leases), default=before))
        size = 0
        for folder in (self.shards, self.parts, self.leases, self.root):
            for path in folder.glob("*"):
                leftover = path.name.startswith(".") and ".tmp" in path.name
                if leftover or (folder == self.shards and path.name not in used):
                    with suppress(FileNotFoundError):  # just renamed by an active writer
                        state = path.stat()
                        if state.st_mtime_ns < before:
                            size += state.st_size
                            if not dry_run:
                                path.unlink()
        return size

    def disk_full(self, needed_bytes: int, entries: int) -> DiskFullError:
        """Return the error for `entries` entries of `needed_bytes` bytes that did not fit on the disk."""
        advice = (
            "Free space (`sdxl-pipeline prune` frees what no project references), or set cache_dir_vae (latents) or cache_dir (text "
            "embeddings) in multidatabackend.json to a folder on a larger disk, and run this again: entries written before are retained."
        )
        return DiskFullError(
            disk_full_message(self.root, f"the next {entries} entries", needed_bytes, advice)
        )

    def _indices_of(self, names: Iterable[str], sizes: Mapping[str, int]) -> list[Index]:
        """Return the indices of these shards, omitting incomplete ones."""
        indices = []
        for name in sorted(names):
            with suppress(ShardError, FileNotFoundError):
                indices.append(MappedShard(self.shards / name).index(sizes[name]))
        return indices
