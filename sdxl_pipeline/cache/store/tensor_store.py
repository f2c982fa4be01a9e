"""Content-addressed store of tensors on disk.

An entry's key is the digest of everything its tensors depend on, so an entry is never wrong, only unused, and duplicates are identical. A
writer first writes a shard, then its part of the index, each atomically: a kill leaves at most a shard that is in no index. The next
writer adds it to the index when it merges all parts into index.parquet under a file lock; so any number of processes may write at once,
and read while others write. Leases (`TensorStore.lease`) decide what a prune may delete.

Each entry has a checksum, which is verified when a store first reads the entry. A corrupt entry is removed from the index, so that it
counts as missing and the stage that writes it encodes it again.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_pipeline.cache.store.shards import (
    Group,
    MappedShard,
    MisplacedEntryError,
    ShardError,
    new_shard_path,
    write_shard,
)
from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.cache.store.store_index import Index, merge_indices, pack_keys, unpack_keys, write_index
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS, CorruptEntryError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CorruptEntryError", "StorageError", "StoreWriter", "TensorStore"]

_log = logging.getLogger(__name__)

# Each is a mapping without an open file: reading from a shard that is not cached costs a tenth of a millisecond more.
_OPEN_SHARDS = 2048
# Parts after which a running writer merges the index, so that opening the store stays fast.
_MERGE_AFTER_PARTS = 256
# Each after rereading the index: a prune may move an entry during a lookup, but hardly twice.
_ATTEMPTS = 3


class TensorStore:
    """A folder of content-addressed entries; each is a small dict of named tensors.

    A key is the 64 hexadecimal digits of a SHA-256; any other raises StorageError. The index is read by the constructor and by `refresh`;
    entries of the store's own writers are added at once. Threads may read from one store.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._folder = StoreFolder(self.root)
        self._indices: tuple[Index, ...] = ()  # the newest last; an entry is in one of them
        self._open: OrderedDict[str, MappedShard] = OrderedDict()
        self._open_lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Reread the index. Entries whose shard is missing or has another size than recorded count as missing."""
        self._indices = (self._folder.read_index(),)
        if len(self) and not self._folder.index_path.exists():
            with suppress(OSError):  # a read-only store is read from its shards each time
                self._folder.merge_index()

    def keys(self) -> frozenset[str]:
        """Return the keys of all entries."""
        return frozenset(key for index in self._indices for key in unpack_keys(index.keys))

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    def __len__(self) -> int:
        return sum(map(len, self._indices))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those of `keys` that have no entry, without duplicates, in the order given."""
        distinct = list(dict.fromkeys(keys))
        packed = _packed(distinct)
        absent = np.ones(len(distinct), bool)
        for index in self._indices:
            absent &= index.find(packed) < 0
        return [distinct[position] for position in np.flatnonzero(absent).tolist()]

    def entry_nbytes(self, keys: Iterable[str]) -> int:
        """Return the bytes of the tensors of these entries, without duplicates. Raises StorageError for a key without entry."""
        distinct = list(dict.fromkeys(keys))
        packed = _packed(distinct)
        total, absent = 0, np.ones(len(distinct), bool)
        for index in self._indices:
            positions = index.find(packed)
            total += int(index.nbytes[positions[positions >= 0]].sum())
            absent &= positions < 0
        if absent.any():
            raise self._no_entry(distinct[int(absent.argmax())])
        return total

    def read(self, key: str) -> "dict[str, Tensor]":
        """Return the tensors of an entry, in the dtype and shape they were added with. Raises StorageError if there is none.

        The tensors are views of the mapped shard. The first read verifies the checksum, and so reads all pages of the entry; a mismatch
        raises CorruptEntryError.
        """
        ((group, row),) = self._located([key])
        return {name: tensor[row] for name, tensor in group.tensors.items()}

    def read_batch(self, keys: Sequence[str]) -> "dict[str, Tensor]":
        """Return the tensors of some entries stacked: row i of each (B, ...) tensor belongs to the entry `keys[i]`.

        They are copied once, from the mapped shards into the batch. Keys may repeat. Raises StorageError with the key when an entry is
        missing, or when it differs from the first in names, shapes or dtypes, and CorruptEntryError when an entry does not match its
        checksum.
        """
        import torch

        if not keys:
            raise StorageError("a batch needs at least one key, and none was given")
        located = self._located(keys)
        layout, sizes = located[0][0].layout, located[0][0].row_bytes
        batch = {name: torch.empty((len(keys), *shape), dtype=dtype) for name, dtype, shape in layout}
        rows = [
            tensor.view(-1).view(torch.uint8).numpy().reshape(len(keys), size)
            for tensor, size in zip(batch.values(), sizes, strict=True)
        ]
        for position, (group, row) in enumerate(located):
            if group.layout != layout:
                raise StorageError(
                    f"{self.root}: the entries {keys[0]} and {keys[position]} cannot be stacked into one batch: "
                    f"{_describe_layout(layout)} and {_describe_layout(group.layout)}"
                )
            for target, source in zip(rows, group.bytes, strict=True):
                target[position] = source[row]
        return batch

    def corrupt_keys(
        self, keys: Iterable[str] | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """Return those of `keys` (default: of all entries) whose entries do not match their checksums or cannot be read.

        Reads every entry that was not verified before. Keys without an entry are omitted. `on_progress(done, total)` counts entries.
        """
        packed = None if keys is None else _packed(list(dict.fromkeys(keys)))
        corrupt: list[str] = []
        total = len(self) if packed is None else len(packed)
        done = 0
        for index in self._indices:
            positions = np.arange(len(index)) if packed is None else index.find(packed)
            positions = positions[positions >= 0]
            for location in positions[np.argsort(index.shard[positions], kind="stable")].tolist():
                key = index.keys[location : location + 1]
                if not self._is_intact(
                    index.shards[index.shard[location]], key.tobytes(), int(index.row[location])
                ):
                    corrupt += unpack_keys(key)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        return corrupt

    def discard_corrupt(self, keys: Iterable[str]) -> list[str]:
        """Remove the `corrupt_keys` ones of `keys` from the index, so that they count as missing, and return them."""
        corrupt = self.corrupt_keys(keys)
        if corrupt:
            _log.warning("%s: %d corrupt entries are removed from the index.", self.root, len(corrupt))
            self.discard(corrupt)
        return corrupt

    def discard(self, keys: Iterable[str]) -> None:
        """Remove entries from the index, so that they count as missing and are encoded again."""
        self._folder.discard(_packed(list(dict.fromkeys(keys))))
        with self._open_lock:
            self._open.clear()
        self.refresh()

    @contextmanager
    def lease(self, keys: Iterable[str], *, purpose: str) -> Iterator[None]:
        """Protect these entries, existing and future, from being pruned while the block runs.

        The index is reread first, so an entry that exists when the block starts exists until it ends. See `StoreFolder.lease`.
        """
        with self._folder.lease(keys, purpose=purpose):
            self.refresh()
            yield

    @contextmanager
    def writer(self, shard_rows: int = 128) -> Iterator["StoreWriter"]:
        """Add entries; they are written `shard_rows` at a time, and the rest when the block ends, even by an exception.

        Nothing that was written since the block started is pruned before it ends. Raises StorageError when the disk is full; entries
        written before are retained.
        """
        if shard_rows < 1:
            raise ValueError(f"shard_rows must be >= 1 (got {shard_rows})")
        writer = StoreWriter(self, shard_rows)
        with self._folder.lease((), purpose="writing entries", writes=True):
            try:
                yield writer
            finally:
                try:
                    writer.flush()
                finally:
                    self._folder.merge_index()

    def _no_entry(self, key: str) -> StorageError:
        return StorageError(f"{self.root} has no entry {key}. Run the stage that writes it again.")

    def _located(self, keys: Sequence[str]) -> list[tuple[Group, int]]:
        """Return the group and row of each key in a mapped shard, after verifying its checksum."""
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                return self._find_in_shards(keys)
            except KeyError as error:
                if last:
                    raise self._no_entry(error.args[0]) from None
            except FileNotFoundError as error:
                if last:
                    raise StorageError(
                        f"{self.root} has lost a shard ({error}). Run the stage that writes it again."
                    ) from error
            except MisplacedEntryError as error:
                if last:
                    raise StorageError(
                        f"{self.root}: the index does not match the shards: {error}"
                    ) from error
                _log.warning("%s. The index of %s is rebuilt from the shards.", error, self.root)
                self._folder.rebuild_index()
            self.refresh()  # another process may have written the entry since, or moved it to another shard
        raise AssertionError("the last attempt returns or raises")

    def _find_in_shards(self, keys: Sequence[str]) -> list[tuple[Group, int]]:
        """Raise KeyError for a key in no index, FileNotFoundError for a missing shard, and CorruptEntryError."""
        packed = _packed(keys)
        found: list[tuple[str, int] | None] = [None] * len(keys)
        for index in self._indices:
            for position, location in enumerate(index.find(packed).tolist()):
                if location >= 0:
                    found[position] = (index.shards[index.shard[location]], int(index.row[location]))
        located = []
        corrupt_keys: dict[str, str] = {}  # key -> reason
        for key, location in zip(keys, found, strict=True):
            if location is None:
                raise KeyError(key)
            name, row = location
            try:
                shard = self._open_shard(name)
                located.append(shard.locate(bytes.fromhex(key), row))
                if not shard.is_intact(row):
                    corrupt_keys[key] = f"row {row} of {shard.path} does not match its checksum"
            except ShardError as error:
                corrupt_keys[key] = str(error)
        if corrupt_keys:
            self.discard(corrupt_keys)
            raise CorruptEntryError(
                f"{self.root}: {len(corrupt_keys)} corrupt entries: {'; '.join(dict.fromkeys(corrupt_keys.values()))}. They were removed from the "
                "index: run the stage that writes them again, which encodes these entries only.",
                list(corrupt_keys),
            )
        return located

    def _is_intact(self, shard_name: str, key: bytes, row: int) -> bool:
        try:
            shard = self._open_shard(shard_name)
            shard.locate(key, row)
            return shard.is_intact(row)
        except (FileNotFoundError, ShardError, MisplacedEntryError):
            return False

    def _open_shard(self, name: str) -> MappedShard:
        """Return a mapped shard, evicting the least recently used one if too many are open."""
        with self._open_lock:
            shard = self._open.get(name)
            if shard is not None:
                self._open.move_to_end(name)
                return shard
        shard = MappedShard(self._folder.shards / name)
        with self._open_lock:
            self._open[name] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _add_shard(self, entries: "Mapping[str, Mapping[str, Tensor]]") -> None:
        shard = new_shard_path(self._folder.shards)
        try:
            index = write_shard(shard, entries)
            write_index(self._folder.parts / f"{shard.stem}.parquet", index)
        except OSError as error:
            shard.unlink(missing_ok=True)
            if error.errno in DISK_FULL_ERRNOS:
                needed = sum(tensor.nbytes for tensors in entries.values() for tensor in tensors.values())
                raise self._folder.disk_full(needed, len(entries)) from error
            raise
        levels = [*self._indices, index]
        # Sizes decrease at least fourfold from level to level, so each entry is copied only a few times.
        while len(levels) > 1 and 4 * len(levels[-1]) > len(levels[-2]):
            levels[-2:] = [merge_indices(levels[-2:])]
        self._indices = tuple(levels)


class StoreWriter:
    """Collects entries and writes them to the store a shard at a time. Created by `TensorStore.writer`."""

    def __init__(self, store: TensorStore, shard_rows: int) -> None:
        self._store = store
        self._shard_rows = shard_rows
        self._shards = 0
        self._entries: dict[str, dict[str, Tensor]] = {}

    def add(self, key: str, tensors: "dict[str, Tensor]") -> None:
        """Add one entry; its tensors are copied to the CPU, so slices of a batch are accepted. An existing key is skipped.

        Raises StorageError when the disk is full.
        """
        import torch

        if not tensors:
            raise ValueError(f"entry {key} has no tensors")
        if key in self._store or key in self._entries:
            return
        self._entries[key] = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        if len(self._entries) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the entries added since the last shard."""
        if not self._entries:
            return
        entries, self._entries = self._entries, {}  # a failed write is not retried
        self._store._add_shard(entries)
        self._shards += 1
        if self._shards % _MERGE_AFTER_PARTS == 0:
            self._store._folder.merge_index()


def _packed(keys: Sequence[str]) -> np.ndarray:
    try:
        return pack_keys(keys)
    except ValueError as error:
        raise StorageError(str(error)) from error


def _describe_layout(layout: "Sequence[tuple[str, object, tuple[int, ...]]]") -> str:
    return ", ".join(
        f"{name} {tuple(shape)} {str(dtype).removeprefix('torch.')}" for name, dtype, shape in layout
    )
