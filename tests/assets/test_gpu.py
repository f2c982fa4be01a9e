"""The whole graph on a real GPU: the detected profile, its precisions, and weights that a CPU can use."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import torch
from safetensors.torch import load_file

from tests.assets.test_graph import materialize, metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_graph_on_the_detected_gpu(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_HARDWARE", "auto")
    result = materialize(instance, make_project(config={"max_train_steps": 20}))
    assert result.success
    assert result.output_for_node("small__lora", "result").steps == 20
    weights = load_file(metadata(result, "small", "lora")["weights"])
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in weights.values())
    assert metadata(result, "small", "lora")["peak_memory_bytes"] > 0
