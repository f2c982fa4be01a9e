"""A finished training with a raised max_train_steps continues from its last checkpoint, and its metadata states it."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from tests.support.asset_graph import DATASET_STAGES, materialize, metadata

STAGES = ["base_model", *DATASET_STAGES, "training_set", "lora"]


@pytest.mark.slow
def test_lora_raised_max_train_steps_continues_the_finished_run(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(config={"lr_scheduler": "constant", "validation_disable": True})
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    first = metadata(materialize(instance, folder, *STAGES), "small", "lora")
    assert (first["steps"], "continued_from" in first) == (3, False)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_train_steps": 5}))
    longer = metadata(materialize(instance, folder, *STAGES), "small", "lora")
    assert longer["steps"] == 5
    assert longer["continued_from"] == f"step 3 of the run {first['identity'][:16]}"
    assert "resumed from step 3" in longer["summary"]
    assert longer["identity"] != first["identity"]
    assert Path(first["weights"]).exists()
