"""The training_set asset: it joins the datasets, and carries what downstream needs to know about them."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, folder_states
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.runtime.specs import TrainingSet
from tests.conftest import DATASET, draw_image
from tests.support.asset_graph import DATASET_STAGES, InProcessStageClient, materialize, stage_key


@pytest.fixture
def folder(make_project: Callable[..., Path]) -> Path:
    folder = make_project(images=4)
    people = {**DATASET, "id": "people", "instance_data_dir": "people", "repeats": 2}
    (folder / "people").mkdir()
    for number in range(3):
        draw_image(folder / "people", number + 10)
    (folder / "multidatabackend.json").write_text(json.dumps([DATASET, people]))
    return folder


def run_all(instance: dg.DagsterInstance, folder: Path) -> dg.ExecuteInProcessResult:
    definitions = build_definitions(folder.parent)
    return dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(dg.AssetKey(["small", "training_set"])).upstream(),
        resources={**(definitions.resources or {}), "launcher": InProcessStageClient()},
        instance=instance,
    )


def test_training_set_has_data_versions_and_fingerprints_of_the_recorded_assets(
    instance: dg.DagsterInstance, folder: Path
):
    result = run_all(instance, folder)
    value = result.output_for_node("small__training_set", "result")
    assert isinstance(value, TrainingSet)
    assert [dataset.dataset_id for dataset in value.datasets] == ["shapes", "people"]
    assert [dataset.repeats for dataset in value.datasets] == [0, 2]
    recorded = {
        f"small/{dataset}_{stage}": stage_key("small", stage, dataset)
        for dataset in ("shapes", "people")
        for stage in DATASET_STAGES
    }
    assert value.data_versions.keys() == recorded.keys()
    for name, key in recorded.items():
        event = instance.get_latest_materialization_event(key)
        assert event
        assert event.asset_materialization
        assert event.asset_materialization.tags
        assert event.asset_materialization.tags["dagster/data_version"] == value.data_versions[name]
    assert value.fingerprints == folder_states(load_project(folder))


@pytest.mark.slow
def test_training_set_data_version_ignores_touched_files_and_changes_with_repeats(
    instance: dg.DagsterInstance, folder: Path
):
    def version() -> str:
        (event,) = run_all(instance, folder).asset_materializations_for_node("small__training_set")
        return str((event.tags or {})["dagster/data_version"])

    first = version()
    (folder / "people" / "image_10.png").touch()
    assert version() == first
    entries = json.loads((folder / "multidatabackend.json").read_text())
    entries[1]["repeats"] = 3
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    assert version() != first


def test_training_set_dataset_value_without_fingerprint_raises_with_a_hint(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], isolated_storage: Path
):
    folder = make_project(images=4)
    materialize(instance, folder, "base_model", *DATASET_STAGES)
    path = isolated_storage / "values" / "small" / "shapes_dataset.parquet"
    table = pd.read_parquet(path)
    assert METADATA_ENTRY in table.attrs
    table.attrs = {}
    table.to_parquet(path)
    with pytest.raises(dg.Failure, match="small/shapes_dataset was written by another version"):
        materialize(instance, folder, "training_set")
