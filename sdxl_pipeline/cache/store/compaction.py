"""Compaction of a store: frees entries that nobody needs while others read and write.

A shard without needed entries is deleted. A shard of which at least a quarter is unneeded is rewritten without those entries; in other
shards unneeded entries stay, and are found if they are needed again. Needed entries are those passed by the caller, those of live leases,
and everything written since the oldest active writer started. New shards are written first, then the index, then shards are deleted; the
last two under the store's lock. A reader whose shard was deleted finds the entry in its new shard.
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
from sdxl_pipeline.cache.store.store_index import Index, merge_indices, unpack_keys
from sdxl_pipeline.files.storage_errors import DISK_FULL_ERRNOS

if TYPE_CHECKING:
    from torch import Tensor

NeededKeys = Callable[[], np.ndarray | None]

REWRITE_THRESHOLD = 0.25
"""Unneeded share of a shard's entries from which on it is rewritten."""

_SHARD_ROWS = 128
# Rewritten before the old shards are deleted, so this bounds the additional disk space.
_ROUND_BYTES = 1 << 30


@dataclass(frozen=True)
class Compaction:
    """What was freed in a store, or would be in a dry run."""

    entries: int
    """Entries that were removed."""
    deleted_shards: int
    rewritten_shards: int
    bytes: int
    """Freed bytes on disk, including leftovers of killed writers."""
    retained_for: tuple[str, ...]
    """Holders of leases whose entries were retained although the caller did not need them."""


def compact(
    root: Path,
    needed: NeededKeys,
    *,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Compaction:
    """Free what the store at `root` holds beyond the `needed` entries and those in use.

    `needed()` returns packed keys in any order, or None for all. It is called under the store's lock, and again before every deletion,
    each time after reading the leases: whoever releases a lease has written its references before.

    `on_progress(done, total)` counts bytes of shards. A kill at any time loses no needed entry. If the disk is too full to rewrite shards,
    they stay as they are.
    """
    folder = StoreFolder(root)
    if not folder.shards.is_dir():
        return Compaction(0, 0, 0, 0, ())
    with folder.locked():
        plan = _plan(folder, needed)
        if dry_run:
            return _estimate(folder, plan)
    total = sum(plan.size[name] for name in plan.dead | plan.sparse)
    rewritten, freed = 0, 0
    # The lease keeps other writers' orphan collection off shards that are not yet in the index.
    with folder.lease((), purpose="prune", writes=True):
        deleted, freed = _commit(folder, needed, plan.dead, merge_indices([]))  # first, to free space
        done = sum(plan.size[name] for name in plan.dead)
        for names in _rounds(plan):
            if on_progress is not None:
                on_progress(done, total)
            new = _rewrite(folder, plan, names)
            count, size = _commit(folder, needed, names, new)
            rewritten, freed = rewritten + count, freed + size
            done += sum(plan.size[name] for name in names)
        with folder.locked():
            index = folder.read_index()
            freed += folder.collect_orphans(index)
    entries = int((index.find(plan.index.keys) < 0).sum())
    return Compaction(entries, deleted, rewritten, freed, plan.retained_for)


@dataclass(frozen=True)
class _Plan:
    index: Index
    needed: np.ndarray  # (N,) bool
    dead: frozenset[str]  # shards of which no entry is needed
    sparse: frozenset[str]  # shards to rewrite
    size: dict[str, int]  # of each shard, in bytes
    retained_for: tuple[str, ...]


def _plan(folder: StoreFolder, needed_keys: NeededKeys) -> _Plan:
    """Return what to delete and rewrite. The lock is held."""
    index = folder.read_index()
    leases = live_leases(folder.leases)
    needed = np.zeros(len(index), bool)
    _mark(needed, index, needed_keys())
    retained_for = []
    for lease in leases:
        before = int(needed.sum())
        _mark(needed, index, lease.keys)
        if int(needed.sum()) > before:
            retained_for.append(lease.holder)
    young = _written_since(folder, index, oldest_writer_ns(leases, default=time.time_ns()))
    if (young[index.shard] & ~needed).any():
        retained_for += [
            lease.holder for lease in leases if lease.writes and lease.holder not in retained_for
        ]
    needed |= young[index.shard]
    # Duplicate rows in another shard are not in the index, and count as unneeded.
    rows = np.zeros(len(index.shards), np.int64)
    np.maximum.at(rows, index.shard, index.row.astype(np.int64) + 1)
    alive = np.bincount(index.shard[needed], minlength=len(index.shards))
    sparse = (alive > 0) & (alive <= (1 - REWRITE_THRESHOLD) * rows) & ~young
    return _Plan(
        index,
        needed,
        dead=_names(index, (alive == 0) & ~young),
        sparse=_names(index, sparse),
        size=dict(zip(index.shards, index.shard_bytes.tolist(), strict=True)),
        retained_for=tuple(retained_for),
    )


def _mark(needed: np.ndarray, index: Index, keys: np.ndarray | None) -> None:
    if keys is None:
        needed[:] = True
        return
    positions = index.find(keys)
    needed[positions[positions >= 0]] = True


def _names(index: Index, mask: np.ndarray) -> frozenset[str]:
    return frozenset(index.shards[code] for code in np.flatnonzero(mask).tolist())


def _written_since(folder: StoreFolder, index: Index, since_ns: int) -> np.ndarray:
    """Return which shards were modified since then: (S,) bool."""
    young = np.zeros(len(index.shards), bool)
    for code, name in enumerate(index.shards):
        with suppress(FileNotFoundError):
            young[code] = (folder.shards / name).stat().st_mtime_ns >= since_ns
    return young


def _estimate(folder: StoreFolder, plan: _Plan) -> Compaction:
    """Return what executing the plan would free. The lock is held."""
    index = plan.index
    affected = np.array([name in plan.dead | plan.sparse for name in index.shards], bool)[index.shard]
    copied = int(index.nbytes[affected & plan.needed].sum())
    freed = sum(plan.size[name] for name in plan.dead | plan.sparse) - copied
    freed += folder.collect_orphans(plan.index, dry_run=True)
    entries = int((affected & ~plan.needed).sum())
    return Compaction(entries, len(plan.dead), len(plan.sparse), freed, plan.retained_for)


def _rounds(plan: _Plan) -> Iterator[frozenset[str]]:
    """Yield the shards to rewrite in groups of about `_ROUND_BYTES`."""
    names: list[str] = []
    size = 0
    for name in sorted(plan.sparse):
        names.append(name)
        size += plan.size[name]
        if size >= _ROUND_BYTES:
            yield frozenset(names)
            names, size = [], 0
    if names:
        yield frozenset(names)


def _rewrite(folder: StoreFolder, plan: _Plan, names: frozenset[str]) -> Index:
    """Copy the needed entries of these shards into new shards and return their index, which is not published yet."""
    indices = []
    entries: dict[str, dict[str, Tensor]] = {}

    def flush() -> None:
        if entries:
            indices.append(write_shard(new_shard_path(folder.shards), entries))
            entries.clear()

    try:
        chosen = np.array([name in names for name in plan.index.shards], bool)
        positions = np.flatnonzero(chosen[plan.index.shard] & plan.needed)
        by_shard = positions[np.argsort(plan.index.shard[positions], kind="stable")]
        codes, starts = np.unique(plan.index.shard[by_shard], return_index=True)
        for code, rows in zip(codes.tolist(), np.split(by_shard, starts[1:]), strict=True):
            name = plan.index.shards[code]
            keys = unpack_keys(plan.index.keys[rows])
            # A shard that is corrupt, or was deleted by another prune, is left as it is.
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
    return merge_indices(indices)


def _commit(
    folder: StoreFolder, needed_keys: NeededKeys, names: frozenset[str], new: Index
) -> tuple[int, int]:
    """Publish `new` in the index and delete those shards of `names` that are no longer needed; return their number and freed bytes."""
    if not names:
        return 0, 0
    with folder.locked():
        parts = folder.part_paths()
        plan = _plan(folder, needed_keys)  # again: leases may have been acquired and entries written
        index = plan.index
        still_needed = index.select(plan.needed & (new.find(index.keys) < 0))
        removable = (names & set(index.shards)) - set(still_needed.shards)
        removed = np.array([name in removable for name in index.shards], bool)
        freed = sum(plan.size[name] for name in removable)
        try:
            folder.write_index(merge_indices([new, index.select(~removed[index.shard])]), parts)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise
            if len(new):  # delete nothing whose copy is not in the index
                for name in new.shards:
                    (folder.shards / name).unlink(missing_ok=True)
                return 0, 0
        for name in removable:
            (folder.shards / name).unlink(missing_ok=True)
    return len(removable), freed - int(new.shard_bytes.sum())
