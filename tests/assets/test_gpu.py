"""The whole graph on a GPU with the detected profile: precision, and weights that load on a CPU."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import torch
from safetensors.torch import load_file

from tests.support.asset_graph import materialize, metadata

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_graph_detected_gpu_trains_weights_that_load_on_cpu(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_HARDWARE", "auto")
    result = materialize(instance, make_project(config={"max_train_steps": 20}), in_process=False)
    assert result.success
    assert result.output_for_node("small__lora", "result").steps == 20
    weights = load_file(metadata(result, "small", "lora")["weights"])
    assert all(tensor.device.type == "cpu" and tensor.isfinite().all() for tensor in weights.values())
    assert metadata(result, "small", "lora")["peak_memory_bytes"] > 0
