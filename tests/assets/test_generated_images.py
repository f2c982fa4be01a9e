"""The generated_images asset of a project with a generate_data.json."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.definitions import build_definitions
from tests.support.asset_graph import materialize, metadata

REQUEST = {"generator": "zorp", "images": 2, "eval_images": 1, "prior_images": 1, "seed": 7}


@pytest.fixture
def folder(make_project: Callable[..., Path]) -> Path:
    folder = make_project(images=0, dataset={"instance_data_dir": "data/zorp", "find_near_duplicates": False})
    (folder / "generate_data.json").write_text(json.dumps(REQUEST))
    return folder


def test_generated_images_project_with_request_is_upstream_of_the_dataset(
    folder: Path, make_project: Callable[..., Path]
) -> None:
    make_project("plain", images=1)
    graph = build_definitions(folder.parent).resolve_asset_graph()
    generated = dg.AssetKey(["small", "generated_images"])
    assert graph.get(dg.AssetKey(["small", "shapes_dataset"])).parent_keys == {generated}
    assert not graph.get(dg.AssetKey(["plain", "shapes_dataset"])).parent_keys
    assert dg.AssetKey(["plain", "generated_images"]) not in graph.get_all_asset_keys()


def test_generated_images_materialization_writes_the_images(
    folder: Path, instance: dg.DagsterInstance
) -> None:
    result = materialize(instance, folder, "generated_images", "dataset")
    assert metadata(result, "small", "generated_images")["folder"] == str(folder / "data")
    assert metadata(result, "small", "shapes_dataset")["kept"] == 2
    second = materialize(instance, folder, "generated_images")
    versions = [
        run.asset_materializations_for_node("small__generated_images")[0].tags["dagster/data_version"]
        for run in (result, second)
    ]
    assert versions[0] == versions[1]


def test_generated_images_invalid_request_fails_without_retries(
    folder: Path, instance: dg.DagsterInstance
) -> None:
    (folder / "generate_data.json").write_text(json.dumps(REQUEST | {"images": -1}))
    assert load_project(folder).name == "small"
    with pytest.raises(dg.Failure, match="'images' is -1") as raised:
        materialize(instance, folder, "generated_images")
    assert raised.value.allow_retries is False
