"""Shards: safetensors files that hold entries whole, and say themselves which.

Entries of the same layout (names, dtypes and shapes of their tensors) lie together: the tensor `<group>/<name>` has a row for each, so
that a header costs the same for one entry and for a hundred. The metadata entry `keys` holds the keys in the order of the rows, group by
group. With them a reader proves that the row it was sent to is the entry it wants, and a lost index can be made again.
"""

import math
import os
import re
import secrets
import time
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.store.index import KEY_BYTES, Index, index_of_shard, pack_keys

if TYPE_CHECKING:
    from torch import Tensor, dtype

    Layout = tuple[tuple[str, dtype, tuple[int, ...]], ...]

_KEYS = "keys"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class ShardError(Exception):
    """A file that is not a shard, or not a whole one."""


class Group:
    """Entries of one layout: a tensor (rows, ...) per name, and the same memory as bytes, (rows, bytes of a row)."""

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


class MappedShard:
    """A shard mapped into memory: reading a row reads its pages, and nothing else.

    Raises FileNotFoundError when there is no such file, ShardError when it is not a whole shard.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        groups: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                keys = bytes.fromhex((file.metadata() or {})[_KEYS])
                for full_name in sorted(file.keys()):
                    number, _, name = full_name.partition("/")
                    groups.setdefault(int(number), {})[name] = file.get_tensor(full_name)
            self.groups = [Group(tensors) for _, tensors in sorted(groups.items())]
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ShardError(f"{path} is not a whole shard ({error})") from error
        self._starts = [0]
        for group in self.groups:
            if any(len(tensor) != group.rows for tensor in group.tensors.values()):
                raise ShardError(f"{path} has groups of uneven tensors")
            self._starts.append(self._starts[-1] + group.rows)
        if len(keys) != KEY_BYTES * self._starts[-1]:
            raise ShardError(f"{path} names {len(keys) // KEY_BYTES} entries and holds {self._starts[-1]}")
        self.path = path
        self.keys = keys

    def place(self, key: bytes, row: int) -> tuple[Group, int]:
        """The group of the entry in `row`, and its row there. Raises ShardError when that is not the entry `key`."""
        if self.keys[row * KEY_BYTES : (row + 1) * KEY_BYTES] != key:
            raise ShardError(f"{self.path} holds another entry in row {row} than the index says")
        number = bisect_right(self._starts, row) - 1
        return self.groups[number], row - self._starts[number]

    def read(self, key: bytes, row: int) -> "dict[str, Tensor]":
        """The tensors of the entry `key`, which is in `row`, in the mapped memory. Raises ShardError when another is there."""
        group, row = self.place(key, row)
        return {name: tensor[row] for name, tensor in group.tensors.items()}

    def index(self, file_bytes: int) -> Index:
        """The index of this shard."""
        nbytes = [np.full(group.rows, sum(group.row_bytes), np.int64) for group in self.groups]
        keys = np.frombuffer(self.keys, dtype=f"S{KEY_BYTES}")
        return index_of_shard(self.path.name, file_bytes, keys, np.concatenate(nbytes))


def new_shard_path(folder: Path) -> Path:
    """A name that no other shard has, of whatever process."""
    return folder / f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}.safetensors"


def write_shard(path: Path, entries: "Mapping[str, Mapping[str, Tensor]]") -> Index:
    """Write entries (contiguous, on the CPU) by key as a shard, and give its index. Raises OSError when the disk refuses."""
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
    nbytes = [
        np.full(len(group), sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout), np.int64)
        for layout, group in groups.items()
    ]
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(flat, temporary, metadata={_KEYS: "".join(keys)})
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        temporary.chmod(mode)  # the library makes files that only their owner can read
    return index_of_shard(path.name, path.stat().st_size, pack_keys(keys), np.concatenate(nbytes))
