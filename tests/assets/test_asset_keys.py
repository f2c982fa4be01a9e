"""Asset keys: the dataset's name is in the last component, no two assets of a project have one key, and a tag selects a dataset."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

import assets
from assets.asset_keys import MAX_TAG_LENGTH, require_distinct_keys
from sdxl_pipeline.config.loader import Project, load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.definitions import build_definitions
from tests.conftest import DATASET

PROJECT_STAGES = {"base_model", "training_plan", "training_set", "lora", "evaluation", "hub_release"}


def write_datasets(folder: Path, *names: str, **changes: object) -> None:
    entries = [{**DATASET, "id": name, **changes} for name in names]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))


def keys_of(folder: Path) -> set[str]:
    graph = build_definitions(folder.parent).resolve_asset_graph()
    return {key.to_user_string() for key in graph.get_all_asset_keys()}


def test_dataset_key_has_two_components_and_no_stage_is_the_end_of_another(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project(images=0)
    masks = {"dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    entries = [{**DATASET, "conditioning_data": "m"}, {"id": "m", **masks}]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    names = {key.removeprefix("small/") for key in keys_of(folder)} - PROJECT_STAGES
    stages = {name.removeprefix("shapes_") for name in names if name.startswith("shapes_")}
    assert names == {f"shapes_{stage}" for stage in stages} | {"m_dataset"}
    assert stages == {"dataset", "aspect_buckets", "vae_latents", "text_embeds", "masks"}
    ends = {f"_{stage}" for stage in stages}
    assert not [(a, b) for a in ends for b in ends if a != b and a.endswith(b)]
    assert not [name for name in {*PROJECT_STAGES, "generated_images"} if name.endswith(tuple(ends))]


@pytest.mark.parametrize(
    "names",
    [
        ("cats", "cats_dataset", "cats_vae"),
        ("generated", "training", "base"),
        ("context", "hardware", "storage"),
    ],
)
def test_build_definitions_dataset_ids_like_stages_or_resources_have_keys_of_their_own(
    make_project: Callable[..., Path], names: tuple[str, ...]
) -> None:
    folder = make_project(images=0)
    write_datasets(folder, *names)
    assert len(keys_of(folder)) == len(PROJECT_STAGES) + 4 * len(names)


def test_require_distinct_keys_repeated_key_raises_with_file_key_value_and_hint(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project(images=0)
    write_datasets(folder, "generated", "shapes")
    project = load_project(folder)
    images = dg.AssetKey(["small", "generated_images"])
    require_distinct_keys(project, [images, dg.AssetKey(["small", "shapes_images"])])
    with pytest.raises(ProjectError) as error:
        require_distinct_keys(project, [images, dg.AssetKey(["small", "shapes_images"]), images])
    (problem,) = error.value.problems
    assert problem.file == folder / "multidatabackend.json"
    assert (problem.key, problem.value) == ('"generated".id', "generated")
    assert "small/generated_images" in problem.message
    assert "another id" in problem.hint


def test_build_definitions_project_with_one_key_twice_is_invalid_and_no_other(
    make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_project("valid", images=0)
    folder = make_project("invalid", images=0)
    build = assets.build_base_model

    def named_like_a_dataset(project: Project) -> dg.AssetsDefinition:
        definition = build(project)
        if project.name != "invalid":
            return definition
        return definition.with_attributes(
            asset_key_replacements={definition.key: dg.AssetKey(["invalid", "shapes_dataset"])}
        )

    monkeypatch.setattr(assets, "build_base_model", named_like_a_dataset)
    keys = keys_of(folder)
    assert "valid/lora" in keys
    assert {key for key in keys if key.startswith("invalid/")} == {"invalid/project"}


def test_tag_of_a_dataset_selects_its_assets(make_project: Callable[..., Path]) -> None:
    folder = make_project(images=0)
    long = "a" * (MAX_TAG_LENGTH + 10)
    write_datasets(folder, "shapes", "my-cats", long)
    graph = build_definitions(folder.parent).resolve_asset_graph()

    def selected(selection: str) -> set[str]:
        keys = dg.AssetSelection.from_string(selection).resolve(graph)
        return {key.to_user_string() for key in keys}

    stages = ("dataset", "aspect_buckets", "vae_latents", "text_embeds")
    assert selected("tag:dataset=shapes") == {f"small/shapes_{stage}" for stage in stages}
    assert selected("tag:dataset=my_cats") == {f"small/my_cats_{stage}" for stage in stages}
    assert len(selected(f"tag:dataset={long[:MAX_TAG_LENGTH]}")) == len(stages)
    assert selected('key:"small/shapes_*"') == selected("tag:dataset=shapes")
