"""Storage paths and the IO manager: tables and manifests in asset graphs, one run per asset."""

from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pandas as pd
import pytest
from pydantic import BaseModel, ConfigDict

from resources.storage import Storage, ValueIOManager, read_parquet


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    sizes: tuple[int, ...]


TABLE = pd.DataFrame(
    {
        "path": ["a.png", "b.png", "ü.png"],
        "width": [64, 128, 256],
        "captions": [["a star"], [], ["one", "two"]],
        "mtime_ns": [1_700_000_000_123_456_789, 2, 3],
    }
)
MANIFEST = Manifest(digest="abc", sizes=(1, 2))


@dg.asset(key=["demo", "shapes_dataset"])
def dataset() -> pd.DataFrame:
    return TABLE


@dg.asset(key=["demo", "lora.v1"])
def lora() -> dg.MaterializeResult[Manifest]:
    return dg.MaterializeResult(value=MANIFEST)


def run(assets, root, selection=None):
    storage = Storage(root=str(root))
    return dg.materialize(
        assets,
        selection=selection,
        resources={"storage": storage, "io_manager": ValueIOManager(storage=storage)},
    )


def test_value_io_manager_table_round_trip_keeps_lists(tmp_path):
    loaded = []

    @dg.asset(ins={"dataset": dg.AssetIn(key=["demo", "shapes_dataset"])})
    def reader(dataset: pd.DataFrame) -> None:
        loaded.append(dataset)

    run([dataset], tmp_path)
    run([dataset, reader], tmp_path, selection=[reader])
    pd.testing.assert_frame_equal(loaded[0], TABLE)
    assert all(type(captions) is list for captions in loaded[0]["captions"])
    assert (tmp_path / "values/demo/shapes_dataset.parquet").exists()


def test_value_io_manager_manifest_is_loaded_as_the_input_type(tmp_path):
    loaded = []

    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"])})
    def by_annotation(lora: Manifest) -> None:
        loaded.append(lora)

    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"], dagster_type=Manifest)})
    def by_dagster_type(lora) -> None:
        loaded.append(lora)

    run([lora], tmp_path)
    run([lora, by_annotation, by_dagster_type], tmp_path, selection=[by_annotation, by_dagster_type])
    assert loaded == [MANIFEST, MANIFEST]
    assert (tmp_path / "values/demo/lora.v1.json").exists()


def test_value_io_manager_path_is_in_the_metadata(tmp_path):
    result = run([dataset], tmp_path)
    (materialization,) = result.asset_materializations_for_node("demo__shapes_dataset")
    assert materialization.metadata["path"] == dg.MetadataValue.path(
        str(tmp_path / "values/demo/shapes_dataset.parquet")
    )


def test_value_io_manager_missing_value_fails_with_the_selection_to_materialize(tmp_path):
    @dg.asset(ins={"dataset": dg.AssetIn(key=["demo", "shapes_dataset"])})
    def reader(dataset: pd.DataFrame) -> None:
        pass

    with pytest.raises(
        dg.Failure, match=r"value of asset demo/shapes_dataset does not exist[\s\S]*Materialize it first"
    ) as raised:
        run([dataset, reader], tmp_path, selection=[reader])
    selection = str(raised.value.description).partition("--select '")[2].partition("'")[0]
    assert dg.AssetSelection.from_string(selection).resolve([dataset, reader]) == {dataset.key}


def test_value_io_manager_manifest_of_another_version_fails(tmp_path):
    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"])})
    def reader(lora: Manifest) -> None:
        pass

    path = tmp_path / "values/demo/lora.v1.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"digest": "abc", "shape": [1]}')
    with pytest.raises(
        dg.Failure, match=r"is not a valid Manifest: it was written by another version[\s\S]*sizes"
    ):
        run([lora, reader], tmp_path, selection=[reader])


def test_value_io_manager_unsupported_type_raises(tmp_path):
    @dg.asset
    def number() -> int:
        return 3

    with pytest.raises(TypeError, match="DataFrames or pydantic models, not <class 'int'>"):
        run([number], tmp_path)


def test_storage_path_from_field_environment_or_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("SDXL_PIPELINE_STORAGE", str(tmp_path / "env"))
    assert Storage(root=str(tmp_path / "field")).path == tmp_path / "field"
    assert Storage().path == tmp_path / "env"
    monkeypatch.delenv("SDXL_PIPELINE_STORAGE")
    assert Storage().path == Path(__file__).parents[2] / "storage"
    monkeypatch.chdir(tmp_path)
    assert Storage(root="here").path == tmp_path / "here"


def test_storage_store_roots_are_shared_unless_configured(tmp_path):
    storage = Storage(root=str(tmp_path))
    own = tmp_path / "own"
    assert storage.latent_store_root(SimpleNamespace(cache_dir_vae=None)) == tmp_path / "latents"
    assert storage.latent_store_root(SimpleNamespace(cache_dir_vae=own)) == own
    assert storage.text_store_root(None) == tmp_path / "text_embeds"
    assert storage.text_store_root(SimpleNamespace(cache_dir=None)) == tmp_path / "text_embeds"
    assert storage.text_store_root(SimpleNamespace(cache_dir=own)) == own


def test_work_dir_is_created_apart_from_values_and_stores(tmp_path):
    folder = Storage(root=str(tmp_path)).work_dir("latents", "values")
    assert folder.is_dir()
    assert folder == tmp_path / "work/latents/values"


def test_write_table_changed_table_gets_another_path(tmp_path):
    storage = Storage(root=str(tmp_path))
    first = storage.write_table(TABLE, tmp_path, "rows")
    repeated = storage.write_table(TABLE.copy(), tmp_path, "rows")
    second = storage.write_table(TABLE[TABLE["width"] > 64], tmp_path, "rows")
    assert first == repeated != second
    pd.testing.assert_frame_equal(read_parquet(first), TABLE)
    pd.testing.assert_frame_equal(read_parquet(second), TABLE[TABLE["width"] > 64])
