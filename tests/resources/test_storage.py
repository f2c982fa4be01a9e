"""Where values lie and what comes back: tables and manifests through real asset graphs, each asset a run of its own."""

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


@dg.asset(key=["demo", "shapes", "dataset"])
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


def test_a_table_comes_back_as_it_was_lists_included(tmp_path):
    seen = []

    @dg.asset(ins={"dataset": dg.AssetIn(key=["demo", "shapes", "dataset"])})
    def reader(dataset: pd.DataFrame) -> None:
        seen.append(dataset)

    run([dataset], tmp_path)
    run([dataset, reader], tmp_path, selection=[reader])
    pd.testing.assert_frame_equal(seen[0], TABLE)
    assert all(type(captions) is list for captions in seen[0]["captions"])
    assert (tmp_path / "values/demo/shapes/dataset.parquet").exists()


def test_a_manifest_comes_back_as_the_type_the_reader_asks_for(tmp_path):
    seen = []

    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"])})
    def by_annotation(lora: Manifest) -> None:
        seen.append(lora)

    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"], dagster_type=Manifest)})
    def by_dagster_type(lora) -> None:
        seen.append(lora)

    run([lora], tmp_path)
    run([lora, by_annotation, by_dagster_type], tmp_path, selection=[by_annotation, by_dagster_type])
    assert seen == [MANIFEST, MANIFEST]
    assert (tmp_path / "values/demo/lora.v1.json").exists()


def test_the_path_is_shown_with_the_materialization(tmp_path):
    result = run([dataset], tmp_path)
    (materialization,) = result.asset_materializations_for_node("demo__shapes__dataset")
    assert materialization.metadata["path"] == dg.MetadataValue.path(
        str(tmp_path / "values/demo/shapes/dataset.parquet")
    )


def test_a_missing_value_names_the_asset_to_materialize_by_a_selection_that_finds_it(tmp_path):
    @dg.asset(ins={"dataset": dg.AssetIn(key=["demo", "shapes", "dataset"])})
    def reader(dataset: pd.DataFrame) -> None:
        pass

    with pytest.raises(
        dg.Failure, match=r"value of asset demo/shapes/dataset is not there[\s\S]*Materialize it first"
    ) as raised:
        run([dataset, reader], tmp_path, selection=[reader])
    selection = str(raised.value.description).partition("--select '")[2].partition("'")[0]
    assert dg.AssetSelection.from_string(selection).resolve([dataset, reader]) == {dataset.key}


def test_a_manifest_of_another_version_says_so(tmp_path):
    @dg.asset(ins={"lora": dg.AssetIn(key=["demo", "lora.v1"])})
    def reader(lora: Manifest) -> None:
        pass

    path = tmp_path / "values/demo/lora.v1.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"digest": "abc", "shape": [1]}')
    with pytest.raises(dg.Failure, match=r"does not fit Manifest; another version[\s\S]*sizes"):
        run([lora, reader], tmp_path, selection=[reader])


def test_a_value_of_another_type_is_refused(tmp_path):
    @dg.asset
    def number() -> int:
        return 3

    with pytest.raises(TypeError, match="DataFrames or pydantic models, not <class 'int'>"):
        run([number], tmp_path)


def test_the_root_comes_from_the_field_the_environment_or_the_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("SDXL_PIPELINE_STORAGE", str(tmp_path / "env"))
    assert Storage(root=str(tmp_path / "field")).path == tmp_path / "field"
    assert Storage().path == tmp_path / "env"
    monkeypatch.delenv("SDXL_PIPELINE_STORAGE")
    assert Storage().path == Path(__file__).parents[2] / "storage"
    monkeypatch.chdir(tmp_path)
    assert Storage(root="here").path == tmp_path / "here"


def test_stores_are_shared_unless_the_project_names_its_own(tmp_path):
    storage = Storage(root=str(tmp_path))
    own = tmp_path / "own"
    assert storage.latent_store_root(SimpleNamespace(cache_dir_vae=None)) == tmp_path / "latents"
    assert storage.latent_store_root(SimpleNamespace(cache_dir_vae=own)) == own
    assert storage.text_store_root(None) == tmp_path / "text_embeds"
    assert storage.text_store_root(SimpleNamespace(cache_dir=None)) == tmp_path / "text_embeds"
    assert storage.text_store_root(SimpleNamespace(cache_dir=own)) == own


def test_work_dirs_exist_and_lie_apart_from_values_and_stores(tmp_path):
    folder = Storage(root=str(tmp_path)).work_dir("latents", "values")
    assert folder.is_dir()
    assert folder == tmp_path / "work/latents/values"


def test_a_kept_table_is_never_overwritten_by_a_later_one(tmp_path):
    storage = Storage(root=str(tmp_path))
    first = storage.keep_table(TABLE, tmp_path, "rows")
    again = storage.keep_table(TABLE.copy(), tmp_path, "rows")
    second = storage.keep_table(TABLE[TABLE["width"] > 64], tmp_path, "rows")
    assert first == again != second
    pd.testing.assert_frame_equal(read_parquet(first), TABLE)
    pd.testing.assert_frame_equal(read_parquet(second), TABLE[TABLE["width"] > 64])
