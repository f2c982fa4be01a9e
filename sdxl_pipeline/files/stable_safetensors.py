"""Deterministic safetensors files: equal content gives equal bytes.

The safetensors library writes the entries of `__metadata__` in an order that varies between processes, so two identical training runs
would give different files. Here the entries are sorted.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sdxl_pipeline.files.atomic_files import atomic_path, write_bytes_atomic

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int64": "I64"}

HASH_KEY: Final = "modelspec.hash_sha256"
"""Metadata entry with "0x" and the SHA-256 of everything after the header (ModelSpec 1.0.1)."""


def stable_safetensors(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file, with `format: pt` added to its metadata; equal content gives equal bytes."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return _header_bytes(header, metadata) + data[8 + length :]


def tensors_sha256(data: bytes) -> str:
    """Return the hex SHA-256 of a safetensors file without its header: what other programs call the model hash."""
    (length,) = struct.unpack("<Q", data[:8])
    return hashlib.sha256(memoryview(data)[8 + length :]).hexdigest()


def write_stable_safetensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]
) -> None:
    """Write `stable_safetensors` to `path` atomically."""
    write_bytes_atomic(path, stable_safetensors(tensors, metadata))


def write_streamed_safetensors(
    path: Path,
    layout: "Mapping[str, Tensor]",
    tensors: "Iterable[tuple[str, Tensor]]",
    metadata: Mapping[str, str],
) -> None:
    """Write tensors one at a time, so that memory is needed only for the largest tensor.

    `layout` has a meta tensor for each tensor of `tensors`, in the same order; the header is built from it. `HASH_KEY` is added to
    `metadata`. The file replaces `path` atomically. Raises ValueError for a tensor that does not match `layout`.
    """
    import torch

    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in layout.items():
        end = offset + tensor.nbytes
        dtype = _DTYPES[str(tensor.dtype)]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    unknown_hash = "0x" + "0" * hashlib.sha256().digest_size * 2
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_header_bytes(entries, {**metadata, HASH_KEY: unknown_hash}))
        expected_entries = iter(layout.items())
        for name, tensor in tensors:
            expected_name, expected = next(expected_entries, (None, tensor))
            if (name, tensor.shape, tensor.dtype) != (expected_name, expected.shape, expected.dtype):
                raise ValueError(
                    f"{path}: the header announces {expected_name}, {tuple(expected.shape)}, {expected.dtype} where "
                    f"{name}, {tuple(tensor.shape)}, {tensor.dtype} follows"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        if (missing := next(expected_entries, None)) is not None:
            raise ValueError(f"{path}: the header announces {missing[0]}, which does not follow")
        file.seek(0)
        file.write(_header_bytes(entries, {**metadata, HASH_KEY: "0x" + digest.hexdigest()}))


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    header = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items())), **entries}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
