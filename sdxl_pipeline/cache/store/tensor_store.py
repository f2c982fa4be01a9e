"""Tensors on disk, found by what they were made from.

An entry's key is the digest of everything its tensors depend on, so an entry is never wrong, only unused, and one that is there twice
is the same twice. A writer first puts a shard in place, then its part of the index, each by rename: a kill leaves at most a shard that
no index names. It is taken into the index by the next writer, which folds all parts into index.parquet under a file lock; so any number
of processes may write at once, and read while others write. What a prune may delete is a matter of leases (`TensorStore.lease`).

Each entry has a checksum, which is verified when a store first reads the entry. A damaged entry is removed from the index, so that it
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
from sdxl_pipeline.cache.store.store_index import Index, merged, pack_keys, unpack_keys, write_index
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS, DamagedEntryError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DamagedEntryError", "StorageError", "StoreWriter", "TensorStore"]

_log = logging.getLogger(__name__)

# A mapping of each, no open file: reading from a shard that is not among them costs a tenth of a millisecond more.
_OPEN_SHARDS = 2048
# Parts that are folded while a writer is still at work, so that opening the store stays quick.
_MERGE_AFTER_PARTS = 256
# Each after reading the index again: a prune may move an entry while it is looked for, but hardly twice.
_ATTEMPTS = 3


class TensorStore:
    """A folder of content-addressed entries; each is a small dict of named tensors.

    A key is the 64 hexadecimal digits of a SHA-256; any other raises StorageError. What the store knows of its index is read when it is
    made and by `refresh`; its own writers' entries are known at once. Threads may read from one store.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._folder = StoreFolder(self.root)
        self._indices: tuple[Index, ...] = ()  # the newest last; an entry stands in one of them
        self._open: OrderedDict[str, MappedShard] = OrderedDict()
        self._open_lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the index again. Entries whose shard is gone, or not of the size it was written with, count as missing."""
        self._indices = (self._folder.read_index(),)
        if len(self) and not self._folder.index_path.exists():
            with suppress(OSError):  # a store that is read only is read from its shards each time
                self._folder.merge_index()

    def keys(self) -> frozenset[str]:
        """The keys of all entries."""
        return frozenset(key for index in self._indices for key in unpack_keys(index.keys))

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])

    def __len__(self) -> int:
        return sum(map(len, self._indices))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no entry, each once, in the order given."""
        distinct = list(dict.fromkeys(keys))
        packed = _packed(distinct)
        absent = np.ones(len(distinct), bool)
        for index in self._indices:
            absent &= index.find(packed) < 0
        return [distinct[position] for position in np.flatnonzero(absent).tolist()]

    def entry_nbytes(self, keys: Iterable[str]) -> int:
        """Bytes of the tensors of these entries, each counted once. Raises StorageError for a key without entry."""
        distinct = list(dict.fromkeys(keys))
        packed = _packed(distinct)
        total, absent = 0, np.ones(len(distinct), bool)
        for index in self._indices:
            places = index.find(packed)
            total += int(index.nbytes[places[places >= 0]].sum())
            absent &= places < 0
        if absent.any():
            raise self._no_entry(distinct[int(absent.argmax())])
        return total

    def read(self, key: str) -> "dict[str, Tensor]":
        """The tensors of an entry, in the dtype and shape they were added with. Raises StorageError when there is none.

        The tensors are views of the mapped shard. The first read verifies the checksum, and so reads all pages of the entry; a mismatch
        raises DamagedEntryError.
        """
        ((group, row),) = self._located([key])
        return {name: tensor[row] for name, tensor in group.tensors.items()}

    def read_batch(self, keys: Sequence[str]) -> "dict[str, Tensor]":
        """The tensors of some entries stacked: row i of each (B, ...) tensor is that of the entry `keys[i]`.

        They are copied once, from the mapped shards into the batch. A key may stand there twice. Raises StorageError, naming the key,
        when there is no such entry, or when it differs from the first in names, shapes or dtypes, and DamagedEntryError when an entry
        does not match its checksum.
        """
        import torch

        if not keys:
            raise StorageError("a batch has at least one entry")
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
                    f"{self.root}: the entries {keys[0]} and {keys[position]} cannot stand in one batch: "
                    f"{_told(layout)} and {_told(group.layout)}"
                )
            for target, source in zip(rows, group.bytes, strict=True):
                target[position] = source[row]
        return batch

    def damaged(
        self, keys: Iterable[str] | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> list[str]:
        """Return those of `keys` (default: of all entries) whose entries do not match their checksums or cannot be read.

        Reads every one of these entries that was not verified before. Keys without an entry are left out. `on_progress(done, total)`
        counts entries.
        """
        packed = None if keys is None else _packed(list(dict.fromkeys(keys)))
        broken: list[str] = []
        total = len(self) if packed is None else len(packed)
        done = 0
        for index in self._indices:
            places = np.arange(len(index)) if packed is None else index.find(packed)
            places = places[places >= 0]
            for place in places[np.argsort(index.shard[places], kind="stable")].tolist():
                key = index.keys[place : place + 1]
                if not self._is_intact(
                    index.shards[index.shard[place]], key.tobytes(), int(index.row[place])
                ):
                    broken += unpack_keys(key)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        return broken

    def discard_damaged(self, keys: Iterable[str]) -> list[str]:
        """Remove those of `keys` that are `damaged` from the index, so that they count as missing, and return them."""
        broken = self.damaged(keys)
        if broken:
            _log.warning("%s: %d damaged entries are removed from the index.", self.root, len(broken))
            self.discard(broken)
        return broken

    def discard(self, keys: Iterable[str]) -> None:
        """Remove entries from the index, so that they count as missing and are encoded again."""
        self._folder.discard(_packed(list(dict.fromkeys(keys))))
        with self._open_lock:
            self._open.clear()
        self.refresh()

    @contextmanager
    def lease(self, keys: Iterable[str], *, purpose: str) -> Iterator[None]:
        """Keep these entries, those there and those yet to be written, from being pruned while the block runs.

        The index is read again first, so an entry that is there when the block begins is there until it ends. See `StoreFolder.lease`.
        """
        with self._folder.lease(keys, purpose=purpose):
            self.refresh()
            yield

    @contextmanager
    def writer(self, shard_rows: int = 128) -> Iterator["StoreWriter"]:
        """Add entries; they are on disk `shard_rows` at a time, and all of them when the block ends, even by an exception.

        Nothing that was written since the block began is pruned before it ends. Raises StorageError when the disk is full; what was
        written before is kept.
        """
        if shard_rows < 1:
            raise ValueError(f"shard_rows is {shard_rows}; a shard holds at least one entry")
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
        return StorageError(f"{self.root} holds no entry {key}. Run the stage that writes it again.")

    def _located(self, keys: Sequence[str]) -> list[tuple[Group, int]]:
        """Return the group and row of each key, in a mapped shard, after its checksum was verified."""
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                return self._look_up(keys)
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
            self.refresh()  # another process has written the entry since, or moved it to another shard
        raise AssertionError("the last attempt returns or raises")

    def _look_up(self, keys: Sequence[str]) -> list[tuple[Group, int]]:
        """Raise KeyError for a key that is in no index, FileNotFoundError when its shard is gone, and DamagedEntryError."""
        packed = _packed(keys)
        found: list[tuple[str, int] | None] = [None] * len(keys)
        for index in self._indices:
            for position, place in enumerate(index.find(packed).tolist()):
                if place >= 0:
                    found[position] = (index.shards[index.shard[place]], int(index.row[place]))
        located = []
        damaged: dict[str, str] = {}  # key -> reason
        for key, place in zip(keys, found, strict=True):
            if place is None:
                raise KeyError(key)
            name, row = place
            try:
                shard = self._open_shard(name)
                located.append(shard.place(bytes.fromhex(key), row))
                if not shard.is_intact(row):
                    damaged[key] = f"row {row} of {shard.path} does not match its checksum"
            except ShardError as error:
                damaged[key] = str(error)
        if damaged:
            self.discard(damaged)
            raise DamagedEntryError(
                f"{self.root}: {len(damaged)} damaged entries: {'; '.join(dict.fromkeys(damaged.values()))}. They were removed from the "
                "index: run the stage that writes them again, which encodes these entries only.",
                list(damaged),
            )
        return located

    def _is_intact(self, shard_name: str, key: bytes, row: int) -> bool:
        try:
            shard = self._open_shard(shard_name)
            shard.place(key, row)
            return shard.is_intact(row)
        except (FileNotFoundError, ShardError, MisplacedEntryError):
            return False

    def _open_shard(self, name: str) -> MappedShard:
        """A mapped shard; the least recently used one is unmapped for it."""
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
        while len(levels) > 1 and 4 * len(levels[-1]) > len(
            levels[-2]
        ):  # each entry is moved only a few times
            levels[-2:] = [merged(levels[-2:])]
        self._indices = tuple(levels)


class StoreWriter:
    """Collects entries and hands them to the store a shard at a time. Made by `TensorStore.writer`."""

    def __init__(self, store: TensorStore, shard_rows: int) -> None:
        self._store = store
        self._shard_rows = shard_rows
        self._shards = 0
        self._entries: dict[str, dict[str, Tensor]] = {}

    def add(self, key: str, tensors: "dict[str, Tensor]") -> None:
        """Add one entry; its tensors are copied to the CPU, so a slice of a batch may be given. A key that is there is skipped.

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
        """Write what was added since the last shard."""
        if not self._entries:
            return
        entries, self._entries = self._entries, {}  # what cannot be written now is not tried again
        self._store._add_shard(entries)
        self._shards += 1
        if self._shards % _MERGE_AFTER_PARTS == 0:
            self._store._folder.merge_index()


def _packed(keys: Sequence[str]) -> np.ndarray:
    try:
        return pack_keys(keys)
    except ValueError as error:
        raise StorageError(str(error)) from error


def _told(layout: "Sequence[tuple[str, object, tuple[int, ...]]]") -> str:
    return ", ".join(
        f"{name} {tuple(shape)} {str(dtype).removeprefix('torch.')}" for name, dtype, shape in layout
    )
