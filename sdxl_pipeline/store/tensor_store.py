"""Tensors on disk, found by what they were made from.

    <root>/shards/<name>.safetensors    some entries, whole
    <root>/index/<name>.parquet         key, shard, nbytes: the entries of one new shard
    <root>/index.parquet                the same for all older shards

An entry's key is the digest of everything its tensors depend on, so an entry is never wrong, only unused, and one that is there twice
is the same twice. A writer first puts a shard in place, then its part of the index, each by rename: a kill leaves at most a shard that
nothing refers to, which a later writer sweeps away. When a writer ends it folds the parts into index.parquet under a file lock, so any
number of processes may write at once, and read while others write.
"""

import fcntl
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_pipeline.store.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

_INDEX_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.string()), ("nbytes", pa.int64()), ("shard_bytes", pa.int64())]
)
_OPEN_SHARDS = 512
# Far longer than a writer takes between putting a shard in place and its index part.
_SWEEP_AFTER_SECONDS = 3600.0


class StoreError(Exception):
    """An entry that is not there, or cannot be read."""


@dataclass(frozen=True)
class _Place:
    shard: str
    nbytes: int
    shard_bytes: int


class TensorStore:
    """A folder of content-addressed entries; each is a small dict of named tensors.

    What it knows of the index is read when it is made and by `refresh`; its own writers' entries are known at once.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._shards = self.root / "shards"
        self._parts = self.root / "index"
        self._index_path = self.root / "index.parquet"
        self._places: dict[str, _Place] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Read the index again. Entries whose shard is gone, or not of the size it was written with, count as missing."""
        places = self._read_index()
        whole = _file_sizes(self._shards)  # after the index, since a shard is there before its row
        self._places = {
            key: place for key, place in places.items() if whole.get(place.shard) == place.shard_bytes
        }

    def keys(self) -> frozenset[str]:
        """The keys of all entries."""
        return frozenset(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no entry, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def entry_nbytes(self, keys: Iterable[str]) -> int:
        """Bytes of the tensors of these entries, each counted once. Raises StoreError for a key without entry."""
        return sum(self._place(key).nbytes for key in dict.fromkeys(keys))

    def read(self, key: str) -> "dict[str, Tensor]":
        """The tensors of an entry, in the dtype and shape they were added with. Raises StoreError when there is none.

        The shard is mapped into memory, so only the pages of this entry are read from the disk.
        """
        place = self._place(key)
        shard, names = self._open_shard(place.shard)
        return {name: shard.get_tensor(f"{key}/{name}") for name in names[key]}

    @contextmanager
    def writer(self, shard_rows: int = 128) -> Iterator["StoreWriter"]:
        """Add entries; they are on disk `shard_rows` at a time, and all of them when the block ends, even by an exception."""
        if shard_rows < 1:
            raise ValueError(f"shard_rows is {shard_rows}; a shard holds at least one entry")
        writer = StoreWriter(self, shard_rows)
        try:
            yield writer
        finally:
            writer.flush()
            self._fold_parts()

    def _place(self, key: str) -> _Place:
        try:
            return self._places[key]
        except KeyError:
            raise StoreError(
                f"{self.root} holds no entry {key}. Run the stage that writes it again."
            ) from None

    def _open_shard(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        """An open shard with the tensor names of each of its entries; the least recently used one is closed for it."""
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            path = self._shards / name
            try:
                shard = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise StoreError(
                    f"{path} cannot be read ({error}). Delete it, and run the stage that writes it again."
                ) from error
            names: dict[str, list[str]] = {}
            for full_name in shard.keys():  # noqa: SIM118 (not a mapping)
                key, _, tensor_name = full_name.rpartition("/")
                names.setdefault(key, []).append(tensor_name)
            self._open[name] = (shard, names)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        found: tuple[Any, dict[str, list[str]]] = self._open[name]
        return found

    def _add_shard(self, entries: "dict[str, dict[str, Tensor]]") -> None:
        from safetensors.torch import save_file

        stem = f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}"
        shard = self._shards / f"{stem}.safetensors"
        flat = {
            f"{key}/{name}": tensor for key, tensors in entries.items() for name, tensor in tensors.items()
        }
        with atomic_path(shard) as temporary:
            save_file(flat, temporary)
        shard_bytes = shard.stat().st_size
        places = {
            key: _Place(shard.name, sum(t.numel() * t.element_size() for t in tensors.values()), shard_bytes)
            for key, tensors in entries.items()
        }
        _write_index(self._parts / f"{stem}.parquet", places)
        self._places |= places

    def _read_index(self) -> dict[str, _Place]:
        # Parts first: one that vanishes between listing and reading has been folded into the index that is read afterwards.
        places: dict[str, _Place] = {}
        for part in sorted(self._parts.glob("[!.]*.parquet")):
            places |= _read_places(part)
        return places | _read_places(self._index_path)

    def _fold_parts(self) -> None:
        """Move the parts' rows into index.parquet, and sweep away what killed writers left."""
        if not self._parts.is_dir():
            return
        with _locked(self.root / ".lock"):
            parts = sorted(self._parts.glob("[!.]*.parquet"))
            if parts:
                places: dict[str, _Place] = {}
                for part in parts:
                    places |= _read_places(part)
                whole = _file_sizes(self._shards)
                places = {
                    key: place
                    for key, place in (_read_places(self._index_path) | places).items()
                    if whole.get(place.shard) == place.shard_bytes
                }
                _write_index(self._index_path, places)
                for part in parts:
                    part.unlink(missing_ok=True)
            self._sweep()

    def _sweep(self) -> None:
        used = {place.shard for place in self._read_index().values()}
        before = time.time() - _SWEEP_AFTER_SECONDS
        for folder in (self._shards, self._parts, self.root):
            for path in folder.glob("*"):
                leftover = path.name.startswith(".") and ".tmp" in path.name
                unused = folder == self._shards and path.name not in used
                if leftover or unused:
                    with suppress(FileNotFoundError):  # a writer at work has just renamed it
                        if path.stat().st_mtime < before:
                            path.unlink()


class StoreWriter:
    """Collects entries and hands them to the store a shard at a time. Made by `TensorStore.writer`."""

    def __init__(self, store: TensorStore, shard_rows: int) -> None:
        self._store = store
        self._shard_rows = shard_rows
        self._entries: dict[str, dict[str, Tensor]] = {}

    def add(self, key: str, tensors: "dict[str, Tensor]") -> None:
        """Add one entry; its tensors are copied to the CPU, so a slice of a batch may be given. A key that is there is skipped."""
        import torch

        if not key or "/" in key:
            raise ValueError(f"{key!r} is not a digest")
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
        if self._entries:
            self._store._add_shard(self._entries)
            self._entries = {}


def _write_index(path: Path, places: dict[str, _Place]) -> None:
    columns = {
        "key": list(places),
        "shard": [place.shard for place in places.values()],
        "nbytes": [place.nbytes for place in places.values()],
        "shard_bytes": [place.shard_bytes for place in places.values()],
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=_INDEX_SCHEMA), temporary)


def _read_places(path: Path) -> dict[str, _Place]:
    try:
        table = pq.read_table(path, schema=_INDEX_SCHEMA)
    except FileNotFoundError:
        return {}
    except pa.ArrowInvalid as error:
        raise StoreError(
            f"{path} is damaged ({error}). Delete it: what it indexes will be made again."
        ) from error
    columns = [table.column(name).to_pylist() for name in _INDEX_SCHEMA.names]
    return {key: _Place(*rest) for key, *rest in zip(*columns, strict=True)}


def _file_sizes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    with suppress(FileNotFoundError):  # swept by another process meanwhile
                        sizes[entry.name] = entry.stat().st_size
    return sizes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system lets go of it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
