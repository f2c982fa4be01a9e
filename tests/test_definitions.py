"""The code location: no import of torch, the keys of the graph, and isolation of invalid projects."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from sdxl_pipeline.definitions import REPOSITORY, build_definitions


def test_definitions_do_not_import_torch() -> None:
    code = "import sys, sdxl_pipeline.definitions as d; d.defs(); print(sorted({'torch','diffusers','transformers','peft'} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert process.stdout.strip() == "[]"


def test_build_definitions_project_has_keys_groups_pools_and_parents(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project("shop")
    graph = build_definitions(folder.parent).resolve_asset_graph()
    keys = {"/".join(key.path) for key in graph.get_all_asset_keys()}
    dataset = {
        f"shop/shapes_{stage}" for stage in ("dataset", "aspect_buckets", "vae_latents", "text_embeds")
    }
    project_stages = ("base_model", "training_plan", "training_set", "lora", "evaluation", "hub_release")
    assert keys == dataset | {f"shop/{stage}" for stage in project_stages}
    for key in graph.get_all_asset_keys():
        assert graph.get(key).group_name == "shop"
        assert graph.get(key).code_version
    pooled = {"/".join(k.path) for k in graph.get_all_asset_keys() if "gpu" in graph.get(k).pools}
    assert pooled == {"shop/shapes_vae_latents", "shop/shapes_text_embeds", "shop/lora", "shop/evaluation"}

    def parents(stage: str) -> set[str]:
        return {"/".join(key.path) for key in graph.get(dg.AssetKey(["shop", stage])).parent_keys}

    assert parents("training_set") == dataset
    assert parents("lora") == {"shop/base_model", "shop/training_set"}
    assert parents("evaluation") == {"shop/base_model", "shop/training_set", "shop/lora"}
    assert parents("hub_release") == {"shop/base_model", "shop/training_set", "shop/lora", "shop/evaluation"}
    for stage in ("vae_latents", "text_embeds"):
        parents_of_stage = graph.get(dg.AssetKey(["shop", f"shapes_{stage}"])).parent_keys
        assert dg.AssetKey(["shop", "training_plan"]) in parents_of_stage


def test_build_definitions_setting_rejected_by_dagster_invalidates_one_project(
    make_project: Callable[..., Path],
) -> None:
    make_project("valid")
    folder = make_project("invalid", config={"retraining_cron": "x x x x x"})
    graph = build_definitions(folder.parent).resolve_asset_graph()
    assert dg.AssetKey(["valid", "lora"]) in graph.get_all_asset_keys()
    invalid = graph.get(dg.AssetKey(["invalid", "project"]))
    assert "DagsterInvalidDefinitionError" in str(invalid.description)
    assert dg.AssetKey(["invalid", "lora"]) not in graph.get_all_asset_keys()


def test_build_definitions_invalid_project_fails_with_its_problems(
    make_project: Callable[..., Path], instance: dg.DagsterInstance
) -> None:
    make_project("valid")
    folder = make_project("invalid", config={"lora_rnak": 8, "learning_rate": "fast"})
    definitions = build_definitions(folder.parent)
    graph = definitions.resolve_asset_graph()
    assert dg.AssetKey(["valid", "lora"]) in graph.get_all_asset_keys()
    with pytest.raises(dg.Failure) as failure:
        dg.materialize(
            list(definitions.assets or []),
            selection=dg.AssetSelection.assets(["invalid", "project"]),
            resources=dict(definitions.resources or {}),
            instance=instance,
        )
    message = str(failure.value.description)
    assert "lora_rnak" in message
    assert "lora_rank" in message
    assert "learning_rate" in message
    assert "fast" in message
    assert "config.json" in message


def test_build_definitions_assets_have_owner_kind_tags_and_description(
    make_project: Callable[..., Path],
) -> None:
    graph = build_definitions(make_project("shop").parent).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        asset = graph.get(key)
        assert asset.owners, key
        assert asset.kinds, key
        assert asset.description, key
        assert asset.tags["device"] == ("gpu" if "gpu" in asset.pools else "cpu"), key


def test_build_definitions_checks_block_where_a_failure_makes_downstream_results_invalid(
    make_project: Callable[..., Path],
) -> None:
    folder = make_project("shop", config={"num_caption_samples": 4})
    graph = build_definitions(folder.parent).resolve_asset_graph()
    blocking = {key.name for key in graph.asset_check_keys if graph.get_check_spec(key).blocking}
    warning = {key.name for key in graph.asset_check_keys} - blocking
    assert blocking == {
        "usable_images", "captions_present", "file_counts_consistent", "crops_planned", "image_counts_consistent",
        "latents_complete", "latents_valid", "weights_valid", "better_than_base", "images_valid", "release_formats_valid",
        "not_memorised",
    }  # fmt: skip
    assert warning == {
        "no_near_duplicates", "no_unused_data", "no_shared_captions", "buckets_fill_a_batch", "no_eval_leakage",
        "captions_not_truncated", "export_formats_valid", "trained_as_configured", "enough_eval_images",
        "not_worse_than_last_release", "checkpoint_selected", "not_overfitted",
    }  # fmt: skip
