"""Freeing what a store holds and nobody needs, while others read it and write to it.

A shard of which no entry is needed is deleted. One of which at least a quarter is not needed is written anew without that; of the
others, what is not needed stays, and is found again should it be wanted. Needed is what the caller names, what a live lease names, and
everything written since the writer at work longest began. New shards come first, then the index, then the deletions, the last two
under the store's lock; a reader whose shard has gone finds the entry in its new one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_pipeline.cache.store.leases import live_leases, oldest_writer_ns
from sdxl_pipeline.cache.store.shards import MappedShard, ShardError, new_shard_path, write_shard
from sdxl_pipeline.cache.store.store_folder import StoreFolder
from sdxl_pipeline.cache.store.store_index import Index, merged, unpack_keys
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS

if TYPE_CHECKING:
    from torch import Tensor

Needed = Callable[[], np.ndarray | None]

REWRITTEN_FROM = 0.25
"""Share of a shard's bytes from which on it is worth copying the rest of it."""

_SHARD_ROWS = 128
# Rewritten before their old shards are deleted: so much room is needed at most, beyond what the store takes.
_ROUND_BYTES = 1 << 30


@dataclass(frozen=True)
class Compaction:
    """What was freed in a store, or would be."""

    entries: int
    """Entries that went."""
    deleted_shards: int
    rewritten_shards: int
    bytes: int
    """Bytes of disk that were freed, leftovers of killed writers included."""
    kept_for: tuple[str, ...]
    """Holders of leases, for which entries were kept that the caller did not name."""


def compact(
    root: Path,
    needed: Needed,
    *,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Compaction:
    """Free what the store at `root` holds beyond the entries `needed` and those in use.

    `needed()` gives packed keys, in any order, or None for all. It is asked under the store's lock, and again before every deletion,
    each time after the leases were looked at: whoever ends a lease has by then written down what it refers to.

    `on_progress(done, total)` counts bytes of shards. A kill at any moment loses no entry that is needed. On a disk that is too full to
    write shards anew, those stay as they are.
    """
    folder = StoreFolder(root)
    if not folder.shards.is_dir():
        return Compaction(0, 0, 0, 0, ())
    with folder.locked():
        plan = _plan(folder, needed)
        if dry_run:
            return _foreseen(folder, plan)
    total = sum(plan.size[name] for name in plan.dead | plan.thin)
    rewritten, freed = 0, 0
    # The lease keeps writers' sweeps off shards that are not yet in the index.
    with folder.lease((), purpose="prune", writes=True):
        deleted, freed = _commit(folder, needed, plan.dead, merged([]))  # first, since it makes room
        done = sum(plan.size[name] for name in plan.dead)
        for names in _rounds(plan):
            if on_progress is not None:
                on_progress(done, total)
            new = _rewritten(folder, plan, names)
            count, size = _commit(folder, needed, names, new)
            rewritten, freed = rewritten + count, freed + size
            done += sum(plan.size[name] for name in names)
        with folder.locked():
            index = folder.read_index()
            freed += folder.collect_orphans(index)
    entries = int((index.find(plan.index.keys) < 0).sum())
    return Compaction(entries, deleted, rewritten, freed, plan.kept_for)


@dataclass(frozen=True)
class _Plan:
    index: Index
    needed: np.ndarray  # (N,) bool
    dead: frozenset[str]  # shards of which no entry is needed
    thin: frozenset[str]  # shards that are to be written anew
    size: dict[str, int]  # of each shard, in bytes
    kept_for: tuple[str, ...]


def _plan(folder: StoreFolder, wanted: Needed) -> _Plan:
    """What is to go, as it stands now. The lock is held."""
    index = folder.read_index()
    leases = live_leases(folder.leases)
    needed = np.zeros(len(index), bool)
    _mark(needed, index, wanted())
    kept_for = []
    for lease in leases:
        before = int(needed.sum())
        _mark(needed, index, lease.keys)
        if int(needed.sum()) > before:
            kept_for.append(lease.holder)
    young = _written_since(folder, index, oldest_writer_ns(leases, default=time.time_ns()))
    if (young[index.shard] & ~needed).any():
        kept_for += [lease.holder for lease in leases if lease.writes and lease.holder not in kept_for]
    needed |= young[index.shard]
    # Rows that stand in another shard too are not in the index, and count as not needed.
    rows = np.zeros(len(index.shards), np.int64)
    np.maximum.at(rows, index.shard, index.row.astype(np.int64) + 1)
    alive = np.bincount(index.shard[needed], minlength=len(index.shards))
    thin = (alive > 0) & (alive <= (1 - REWRITTEN_FROM) * rows) & ~young
    return _Plan(
        index,
        needed,
        dead=_names(index, (alive == 0) & ~young),
        thin=_names(index, thin),
        size=dict(zip(index.shards, index.shard_bytes.tolist(), strict=True)),
        kept_for=tuple(kept_for),
    )


def _mark(needed: np.ndarray, index: Index, keys: np.ndarray | None) -> None:
    if keys is None:
        needed[:] = True
        return
    places = index.find(keys)
    needed[places[places >= 0]] = True


def _names(index: Index, mask: np.ndarray) -> frozenset[str]:
    return frozenset(index.shards[code] for code in np.flatnonzero(mask).tolist())


def _written_since(folder: StoreFolder, index: Index, moment_ns: int) -> np.ndarray:
    """Which shards are as young as that: (S,) bool."""
    young = np.zeros(len(index.shards), bool)
    for code, name in enumerate(index.shards):
        with suppress(FileNotFoundError):
            young[code] = (folder.shards / name).stat().st_mtime_ns >= moment_ns
    return young


def _foreseen(folder: StoreFolder, plan: _Plan) -> Compaction:
    """What freeing as planned comes to. The lock is held."""
    index = plan.index
    going = np.array([name in plan.dead | plan.thin for name in index.shards], bool)[index.shard]
    copied = int(index.nbytes[going & plan.needed].sum())
    freed = sum(plan.size[name] for name in plan.dead | plan.thin) - copied
    freed += folder.collect_orphans(plan.index, dry_run=True)
    entries = int((going & ~plan.needed).sum())
    return Compaction(entries, len(plan.dead), len(plan.thin), freed, plan.kept_for)


def _rounds(plan: _Plan) -> Iterator[frozenset[str]]:
    """The shards to write anew, some at a time."""
    names: list[str] = []
    size = 0
    for name in sorted(plan.thin):
        names.append(name)
        size += plan.size[name]
        if size >= _ROUND_BYTES:
            yield frozenset(names)
            names, size = [], 0
    if names:
        yield frozenset(names)


def _rewritten(folder: StoreFolder, plan: _Plan, names: frozenset[str]) -> Index:
    """Copy what is needed of these shards into new ones, and give their index, which nobody else knows yet."""
    indices = []
    entries: dict[str, dict[str, Tensor]] = {}

    def flush() -> None:
        if entries:
            indices.append(write_shard(new_shard_path(folder.shards), entries))
            entries.clear()

    try:
        chosen = np.array([name in names for name in plan.index.shards], bool)
        places = np.flatnonzero(chosen[plan.index.shard] & plan.needed)
        by_shard = places[np.argsort(plan.index.shard[places], kind="stable")]
        codes, starts = np.unique(plan.index.shard[by_shard], return_index=True)
        for code, rows in zip(codes.tolist(), np.split(by_shard, starts[1:]), strict=True):
            name = plan.index.shards[code]
            keys = unpack_keys(plan.index.keys[rows])
            # A shard that is damaged, or was deleted by another prune, is left as it is.
            with suppress(FileNotFoundError, ShardError):
                shard = MappedShard(folder.shards / name)
                for key, row in zip(keys, plan.index.row[rows].tolist(), strict=True):
                    entries[key] = shard.read(bytes.fromhex(key), row)
            if len(entries) >= _SHARD_ROWS:
                flush()
        flush()
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
    return merged(indices)


def _commit(folder: StoreFolder, wanted: Needed, names: frozenset[str], new: Index) -> tuple[int, int]:
    """Take `new` into the index and delete those shards among `names` that are not needed any more: how many, of how many bytes."""
    if not names:
        return 0, 0
    with folder.locked():
        parts = folder.part_paths()
        plan = _plan(folder, wanted)  # again, since leases may have been taken and entries written
        index = plan.index
        still_needed = index.selected(plan.needed & (new.find(index.keys) < 0))
        removable = (names & set(index.shards)) - set(still_needed.shards)
        gone = np.array([name in removable for name in index.shards], bool)
        freed = sum(plan.size[name] for name in removable)
        try:
            folder.write_index(merged([new, index.selected(~gone[index.shard])]), parts)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            if len(new):  # nothing may go whose copy is not in the index
                for name in new.shards:
                    (folder.shards / name).unlink(missing_ok=True)
                return 0, 0
        for name in removable:
            (folder.shards / name).unlink(missing_ok=True)
    return len(removable), freed - int(new.shard_bytes.sum())
