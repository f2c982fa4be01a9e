"""The files of a store: what is there, what is folded, what is swept away. `TensorStore` says what they mean.

<root>/shards/<name>.safetensors    some entries, whole
<root>/index/<name>.parquet         where the entries of one new shard lie
<root>/index.parquet                the same for all older shards
<root>/leases/<name>.lease          what a living process reads or writes
<root>/.lock                        held while the index, or who may rely on it, is changed
"""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import lock_descriptor

from sdxl_pipeline.cache.store.leases import held_lease, live_leases, oldest_writer_ns
from sdxl_pipeline.cache.store.shards import MappedShard, ShardError
from sdxl_pipeline.cache.store.store_index import (
    Index,
    IndexFileError,
    merged,
    pack_keys,
    read_index,
    write_index,
)
from sdxl_pipeline.files.disk_space import DiskFullError, disk_full_message
from sdxl_pipeline.files.storage_errors import StorageError, ignore_full_disk

# Far longer than a writer takes between putting a shard in place and its index part.
ORPHAN_AGE_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class StoreFolder:
    """The files of the store at `root`, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = root / "shards"
        self.parts = root / "index"
        self.index_path = root / "index.parquet"
        self.leases = root / "leases"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock, which no other process then holds; the system lets go of it when this process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            lock_descriptor(file.fileno(), poll_interval=0.01)
            yield

    def lease(
        self, keys: Iterable[str], *, purpose: str, writes: bool = False
    ) -> AbstractContextManager[None]:
        """Keep these entries, those there and those yet to be written, from being pruned while the block runs.

        An index that is read in the block holds what stays until its end; when the process dies, the lease ends. `purpose` is shown
        to who wonders why nothing is freed. With `writes`, nothing goes that was written since the block began.
        """
        try:
            packed = pack_keys(list(dict.fromkeys(keys)))
        except ValueError as error:
            raise StorageError(str(error)) from error
        return held_lease(self.leases, self.locked(), packed, purpose=purpose, writes=writes)

    def part_paths(self) -> list[Path]:
        """The parts of the index that are not folded yet."""
        return sorted(self.parts.glob("[!.]*.parquet"))

    def shard_sizes(self) -> dict[str, int]:
        """Size in bytes of every file that stands as a shard, by name."""
        sizes: dict[str, int] = {}
        if self.shards.is_dir():
            with os.scandir(self.shards) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with suppress(FileNotFoundError):  # swept by another process meanwhile
                            sizes[entry.name] = entry.stat().st_size
        return sizes

    def read_index(self) -> Index:
        """Return every entry that is stored in a whole shard. An index file that is damaged is rebuilt from the shards."""
        # Parts first: one that vanishes between listing and reading has been folded into the index that is read afterwards.
        damaged: list[Path] = []
        parts = [self._readable(part, damaged) for part in self.part_paths()]
        folded = self._readable(self.index_path, damaged)
        sizes = self.shard_sizes()  # after the indices, since a shard is there before its row
        indices = [index for index in (folded, *parts) if index is not None]
        if folded is None or damaged:  # the shards themselves hold the keys of their entries
            named = {name for index in indices for name in index.shards}
            indices += self._indices_of(sizes.keys() - named, sizes)
        # Before they are merged: of two places of an entry, the one in a whole shard counts.
        return merged(index.of_whole_shards(sizes) for index in indices)

    def _readable(self, path: Path, damaged: list[Path]) -> Index | None:
        """Return an index file's content. One that is damaged is deleted: its rows are in the shards too."""
        try:
            return read_index(path)
        except IndexFileError as error:
            _log.warning("%s. It is deleted and rebuilt from the shards.", error)
            damaged.append(path)
            with suppress(OSError):  # a store that is read only is read as if the file were absent
                path.unlink()
            return None

    def rebuild_index(self) -> Index:
        """Write index.parquet anew from the shards alone, and return it. Reads every entry, and leaves out damaged ones."""
        with self.locked():
            parts = self.part_paths()
            sizes = self.shard_sizes()
            index = merged(self._indices_of(sizes, sizes))
            with ignore_full_disk():
                self.write_index(index, parts)
        return index

    def discard(self, keys: np.ndarray) -> None:
        """Remove packed keys from the index, so that their entries count as missing. Their shards stay until they are pruned."""
        with self.locked():
            parts = self.part_paths()
            index = self.read_index()
            places = index.find(keys)
            kept = np.ones(len(index), bool)
            kept[places[places >= 0]] = False
            self.write_index(index.selected(kept), parts)

    def write_index(self, index: Index, folded: Iterable[Path]) -> None:
        """Put `index` in the place of index.parquet and of the parts `folded`. The lock is held."""
        write_index(self.index_path, index)
        for part in folded:
            part.unlink(missing_ok=True)

    def merge_index(self) -> None:
        """Move the parts' rows into index.parquet, take in shards that no index names, and sweep away leftovers.

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
                index = merged([index, *self._indices_of(orphans, sizes)])
                self.write_index(index, parts)
            self.collect_orphans(index)

    def collect_orphans(self, index: Index, dry_run: bool = False) -> int:
        """Delete what killed writers left, and give how many bytes that is. The lock is held.

        Only what is older than an hour, and older than the oldest writer at work, goes: unfinished files, and shards of which no entry
        is in `index`.
        """
        used = {index.shards[code] for code in np.unique(index.shard).tolist()}
        before = time.time_ns() - int(ORPHAN_AGE_SECONDS * 1e9)
        before = min(before, oldest_writer_ns(live_leases(self.leases), default=before))
        size = 0
        for folder in (self.shards, self.parts, self.leases, self.root):
            for path in folder.glob("*"):
                leftover = path.name.startswith(".") and ".tmp" in path.name
                if leftover or (folder == self.shards and path.name not in used):
                    with suppress(FileNotFoundError):  # a writer at work has just renamed it
                        state = path.stat()
                        if state.st_mtime_ns < before:
                            size += state.st_size
                            if not dry_run:
                                path.unlink()
        return size

    def disk_full(self, needed_bytes: int, entries: int) -> DiskFullError:
        """What to raise when `entries` of so many bytes found no room."""
        advice = (
            "Free space (`sdxl-pipeline prune` frees what no project refers to), or set cache_dir_vae (of latents) or cache_dir (of text "
            "embeddings) in multidatabackend.json to a folder on a larger disk, and run this again: what was written before is kept."
        )
        return DiskFullError(
            disk_full_message(self.root, f"the next {entries} entries", needed_bytes, advice)
        )

    def _indices_of(self, names: Iterable[str], sizes: Mapping[str, int]) -> list[Index]:
        """The indices of these shards, without those that are no whole shards."""
        indices = []
        for name in sorted(names):
            with suppress(ShardError, FileNotFoundError):
                indices.append(MappedShard(self.shards / name).index(sizes[name]))
        return indices
