"""Shards: self-describing safetensors files of entries.

Entries of the same layout (names, dtypes and shapes of their tensors) form a group: the tensor `<group>/<name>` has one row per entry, so
the header costs the same for one entry and for a hundred. The metadata entry `keys` holds the keys in the order of the rows, group by
group: readers verify that a row is the expected entry, and a lost index can be rebuilt. The metadata entry `crc32` holds one checksum per
entry in the same order, over its layout and its bytes; a reader verifies it when it first reads the entry.
"""

import math
import os
import re
import secrets
import time
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_pipeline.cache.store.store_index import KEY_BYTES, Index, index_of_shard, pack_keys
from sdxl_pipeline.files.atomic_files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, dtype

    Layout = tuple[tuple[str, dtype, tuple[int, ...]], ...]

_KEYS = "keys"
_CHECKSUMS = "crc32"
_CHECKSUM_DTYPE = np.dtype(">u4")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class ShardError(Exception):
    """A file is not a complete, valid shard."""


class MisplacedEntryError(Exception):
    """The index points to a row of a shard that holds another entry, or none."""


class Group:
    """Entries of one layout: a tensor (rows, ...) per name, and the same memory as bytes, (rows, bytes per row)."""

    def __init__(self, tensors: "dict[str, Tensor]") -> None:
        import torch

        self.tensors = tensors
        self.rows = len(next(iter(tensors.values())))
        self.layout: Layout = tuple(
            (name, tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()
        )
        self.row_bytes = [math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors.values()]
        self.bytes = [
            tensor.reshape(-1).view(torch.uint8).numpy().reshape(self.rows, size)
            for tensor, size in zip(tensors.values(), self.row_bytes, strict=True)
        ]
        self._layout_crc32 = zlib.crc32(repr(self.layout).encode())

    def crc32(self, row: int) -> int:
        """Return the checksum of a row: CRC-32 of its layout, then of the bytes of its tensors in the order of their names."""
        checksum = self._layout_crc32
        for tensor in self.bytes:
            checksum = zlib.crc32(tensor[row], checksum)
        return checksum


class MappedShard:
    """A memory-mapped shard: reading a row reads only its pages.

    Raises FileNotFoundError when the file does not exist, ShardError when it is not a complete shard.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        groups: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                keys = bytes.fromhex(metadata[_KEYS])
                checksums = np.frombuffer(bytes.fromhex(metadata[_CHECKSUMS]), _CHECKSUM_DTYPE)
                for full_name in sorted(file.keys()):
                    number, _, name = full_name.partition("/")
                    groups.setdefault(int(number), {})[name] = file.get_tensor(full_name)
            self.groups = [Group(tensors) for _, tensors in sorted(groups.items())]
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ShardError(f"{path} is not a complete shard ({error})") from error
        self._starts = [0]
        for group in self.groups:
            if any(len(tensor) != group.rows for tensor in group.tensors.values()):
                raise ShardError(f"{path} has groups of tensors with different row counts")
            self._starts.append(self._starts[-1] + group.rows)
        if len(keys) != KEY_BYTES * self._starts[-1]:
            raise ShardError(f"{path} lists {len(keys) // KEY_BYTES} keys for {self._starts[-1]} entries")
        if len(checksums) != self._starts[-1]:
            raise ShardError(f"{path} has {len(checksums)} checksums for {self._starts[-1]} entries")
        self.path = path
        self.keys = keys
        self._checksums = checksums
        self._verified = bytearray(len(checksums))

    def locate(self, key: bytes, row: int) -> tuple[Group, int]:
        """Return the group of the entry in `row`, and its row in the group. Raises MisplacedEntryError if its key is not `key`."""
        if self.keys[row * KEY_BYTES : (row + 1) * KEY_BYTES] != key:
            raise MisplacedEntryError(f"row {row} of {self.path} holds another entry than the index lists")
        return self._group(row)

    def is_intact(self, row: int) -> bool:
        """Return whether the entry in `row` matches its checksum. Its bytes are read on the first call only."""
        if not self._verified[row]:
            group, row_in_group = self._group(row)
            self._verified[row] = group.crc32(row_in_group) == int(self._checksums[row])
        return bool(self._verified[row])

    def read(self, key: bytes, row: int) -> "dict[str, Tensor]":
        """Return the tensors of the entry `key` in `row`, as views of the mapped memory. Raises ShardError for a corrupt entry."""
        group, row_in_group = self.locate(key, row)
        if not self.is_intact(row):
            raise ShardError(f"row {row} of {self.path} does not match its checksum")
        return {name: tensor[row_in_group] for name, tensor in group.tensors.items()}

    def index(self, file_bytes: int) -> Index:
        """Return the index of the intact entries of this shard. Reads all of them."""
        nbytes = [np.full(group.rows, sum(group.row_bytes), np.int64) for group in self.groups]
        keys = np.frombuffer(self.keys, dtype=f"S{KEY_BYTES}")
        index = index_of_shard(self.path.name, file_bytes, keys, np.concatenate(nbytes))
        return index.select(np.array([self.is_intact(row) for row in index.row.tolist()], bool))

    def _group(self, row: int) -> tuple[Group, int]:
        number = bisect_right(self._starts, row) - 1
        return self.groups[number], row - self._starts[number]


def new_shard_path(folder: Path) -> Path:
    """Return a path that is unique among the shards of all processes."""
    return folder / f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}.safetensors"


def write_shard(path: Path, entries: "Mapping[str, Mapping[str, Tensor]]") -> Index:
    """Write entries (contiguous, on the CPU) by key as a shard, and return its index. Raises OSError when the disk fails or is full."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    groups: dict[Layout, list[str]] = {}
    for key, tensors in entries.items():
        layout = tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors))
        groups.setdefault(layout, []).append(key)
    flat = {
        f"{number}/{name}": torch.stack([entries[key][name] for key in keys])
        for number, (layout, keys) in enumerate(groups.items())
        for name, _, _ in layout
    }
    keys = [key for group in groups.values() for key in group]
    checksums = []
    for number, (layout, members) in enumerate(groups.items()):
        group = Group({name: flat[f"{number}/{name}"] for name, _, _ in layout})
        checksums += [group.crc32(row) for row in range(len(members))]
    nbytes = [
        np.full(len(group), sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout), np.int64)
        for layout, group in groups.items()
    ]
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            checksum_bytes = np.array(checksums, _CHECKSUM_DTYPE).tobytes()
            save_file(flat, temporary, metadata={_KEYS: "".join(keys), _CHECKSUMS: checksum_bytes.hex()})
        except SafetensorError as error:
            match = _OS_ERROR.search(str(error))
            if match is None:
                raise
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        temporary.chmod(mode)  # safetensors creates files that only their owner can read
    return index_of_shard(path.name, path.stat().st_size, pack_keys(keys), np.concatenate(nbytes))
