"""Safetensors files: equal content gives equal bytes, which any safetensors reader accepts."""

import hashlib
import struct
import weakref
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdxl_pipeline.files.stable_safetensors import (
    HASH_KEY,
    stable_safetensors,
    write_stable_safetensors,
    write_streamed_safetensors,
)

STREAMED = {
    "position_ids": torch.arange(77)[None],
    "transposed": torch.randn(5, 3).half().T,
    "scalar": torch.tensor(4.6),
    "marker": torch.zeros(0, dtype=torch.bfloat16),
}
LAYOUT = {name: tensor.to("meta") for name, tensor in STREAMED.items()}


def test_stable_safetensors_ignores_metadata_order():
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {str(number): "ü" * number for number in range(30)}
    backwards = dict(reversed(metadata.items()))
    first = stable_safetensors(tensors, metadata)
    assert stable_safetensors(dict(reversed(tensors.items())), backwards) == first
    assert first.index(b'"0":') < first.index(b'"1":') < first.index(b'"29":') < first.index(b'"3":')


def test_write_stable_safetensors_round_trip(tmp_path):
    tensors = {"x": torch.randn(3, 5).T, "y": torch.tensor([1, 2], dtype=torch.int8), "z": torch.zeros(0)}
    write_stable_safetensors(tmp_path / "file.safetensors", tensors, {"name": "größe"})
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "name": "größe"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_write_streamed_safetensors_round_trip_with_hash(tmp_path):
    path = tmp_path / "big.safetensors"
    write_streamed_safetensors(path, LAYOUT, STREAMED.items(), {"modelspec.title": "größe"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "modelspec.title": "größe",
            HASH_KEY: "0x" + hashlib.sha256(data[8 + length :]).hexdigest(),
        }
    loaded = load_file(path)
    assert loaded.keys() == STREAMED.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STREAMED.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in STREAMED.items())


def test_write_streamed_safetensors_holds_one_tensor_in_memory(tmp_path):
    alive: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(6):
            assert sum(reference() is not None for reference in alive) <= 1, "all but the last are freed"
            tensor = torch.full((1000,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"tensor_{number}", tensor
            del tensor

    layout = {f"tensor_{number}": torch.empty(1000, device="meta") for number in range(6)}
    write_streamed_safetensors(tmp_path / "big.safetensors", layout, tensors(), {})
    assert load_file(tmp_path / "big.safetensors")["tensor_5"][0] == 5


@pytest.mark.parametrize(
    "tensors",
    [
        {**STREAMED, "scalar": torch.tensor(4.6).half()},
        {**STREAMED, "transposed": torch.zeros(5, 3).half()},
        {name: tensor for name, tensor in STREAMED.items() if name != "marker"},
        {**STREAMED, "another": torch.zeros(1)},
        dict(reversed(STREAMED.items())),
    ],
)
def test_write_streamed_safetensors_of_unexpected_tensors_raises_without_file(tmp_path, tensors):
    with pytest.raises(ValueError, match="the header announces"):
        write_streamed_safetensors(tmp_path / "big.safetensors", LAYOUT, tensors.items(), {})
    assert list(tmp_path.iterdir()) == []
