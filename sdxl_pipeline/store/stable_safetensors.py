"""Safetensors files whose bytes depend on nothing but their content.

The safetensors library writes the entries of `__metadata__` in an order that changes from process to process, so that one training
run twice would give two different files. Here they are sorted.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_pipeline.store.files import write_bytes_atomic

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8


def stable_safetensors(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, with `format: pt` added to its metadata; equal content gives equal bytes."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def tensors_sha256(data: bytes) -> str:
    """Return the hex SHA-256 of the tensors of a safetensors file, without its header: what other programs call the model's hash."""
    (length,) = struct.unpack("<Q", data[:8])
    return hashlib.sha256(memoryview(data)[8 + length :]).hexdigest()


def write_stable_safetensors(
    path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]
) -> None:
    """Write `stable_safetensors` beside `path` and rename it there."""
    write_bytes_atomic(path, stable_safetensors(tensors, metadata))
