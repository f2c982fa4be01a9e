"""Holds that a finished training whose max_train_steps is raised in config.json goes on from its end, and that the run's page says so."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from tests.assets.test_graph import DATASET, materialize, metadata

STAGES = ["base_model", *DATASET, "lora"]


@pytest.mark.slow
def test_a_longer_training_goes_on_from_the_end_of_the_shorter(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(config={"lr_scheduler": "constant", "validation_disable": True})
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    first = metadata(materialize(instance, folder, *STAGES), "small", "lora")
    assert (first["steps"], "begun_from" in first) == (3, False)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_train_steps": 5}))
    longer = metadata(materialize(instance, folder, *STAGES), "small", "lora")
    assert longer["steps"] == 5
    assert longer["begun_from"] == f"step 3 of the run {first['identity'][:16]}"
    assert "resumed from step 3" in longer["summary"]
    assert longer["identity"] != first["identity"]
    assert Path(first["weights"]).exists()
