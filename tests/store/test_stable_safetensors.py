"""Holds that equal content gives equal bytes, which any safetensors reader understands."""

import torch
from safetensors import safe_open

from sdxl_pipeline.store.stable_safetensors import stable_safetensors, write_stable_safetensors


def test_metadata_in_any_order_gives_the_same_bytes():
    tensors = {"b": torch.arange(3), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {str(number): "ü" * number for number in range(30)}
    backwards = dict(reversed(metadata.items()))
    first = stable_safetensors(tensors, metadata)
    assert stable_safetensors(dict(reversed(tensors.items())), backwards) == first
    assert first.index(b'"0":') < first.index(b'"1":') < first.index(b'"29":') < first.index(b'"3":')


def test_the_reader_gets_everything_back(tmp_path):
    tensors = {"x": torch.randn(3, 5).T, "y": torch.tensor([1, 2], dtype=torch.int8), "z": torch.zeros(0)}
    write_stable_safetensors(tmp_path / "file.safetensors", tensors, {"name": "größe"})
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "name": "größe"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
