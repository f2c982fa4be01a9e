"""The whole graph with adapters other than a LoRA, and a second project that continues from the first one's file."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.asset_graph import materialize, metadata

LOKR = {
    "bypass_mode": True,
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 12,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 12}}},
}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        pytest.param(
            {"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"},
            "LoKr (LyCORIS)",
            marks=pytest.mark.slow,
        ),
        pytest.param({"use_dora": True}, "DoRA of rank 4", marks=pytest.mark.slow),
    ],
)
def test_graph_other_adapter_is_trained_released_and_continued(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], config: dict, kind: str
) -> None:
    folder = make_project(config=config)
    (folder / "lycoris_config.json").write_text(json.dumps(LOKR))
    result = materialize(instance, folder)
    assert result.success
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert checks["weights_valid"].passed
    assert checks["release_formats_valid"].passed
    trained = metadata(result, "small", "lora")
    assert trained["adapter"] == kind
    release = Path(metadata(result, "small", "hub_release")["folder"])
    weights = Path(trained["weights"])
    assert (release / "pytorch_lora_weights.safetensors").read_bytes() == weights.read_bytes()
    kohya_tensors = load_file(release / "small.safetensors")
    assert all(name.startswith("lora_unet_") for name in kohya_tensors)
    assert any(".lokr_w1" in name for name in kohya_tensors) == ("LyCORIS" in kind)
    assert not any("dora_scale" in name or "magnitude" in name for name in kohya_tensors)
    card = (release / "README.md").read_text()
    assert kind in card
    assert ("create_lycoris_from_weights" in card) == ("LyCORIS" in kind)

    second = make_project(name="second", config={**config, "init_lora": str(weights)})
    (second / "lycoris_config.json").write_text(json.dumps(LOKR))
    again = materialize(
        instance,
        second,
        "base_model",
        "dataset",
        "aspect_buckets",
        "vae_latents",
        "text_embeds",
        "training_set",
        "lora",
    )
    assert again.success
    assert metadata(again, "second", "lora")["init_lora_sha256"] == trained["sha256"]


@pytest.mark.slow
def test_graph_partially_loadable_file_is_not_released(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    upstream = (
        "base_model",
        "dataset",
        "aspect_buckets",
        "vae_latents",
        "text_embeds",
        "training_set",
        "lora",
        "evaluation",
    )
    first = materialize(instance, folder, *upstream)
    kohya = Path(metadata(first, "small", "lora")["kohya_weights"])
    tensors = load_file(kohya)
    tensors["lora_unet_zorp.alpha"] = torch.ones(())
    with safe_open(kohya, framework="pt") as file:
        save_file(tensors, kohya, file.metadata())

    with pytest.raises(dg.Failure, match=r"small.safetensors was modified after it was written"):
        materialize(instance, folder, "hub_release")
    with pytest.raises(dg.DagsterError, match="release_formats_valid"):
        materialize(instance, folder, "evaluation", "hub_release")
    assert not (folder / "output" / "release").exists()

    again = materialize(instance, folder, "lora", "evaluation", "hub_release")
    assert "reused" in metadata(again, "small", "lora")["summary"]
    assert again.success


@pytest.mark.slow
def test_graph_comfyui_format_releases_only_the_kohya_file(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    result = materialize(instance, make_project(config={"lora_format": "comfyui"}))
    release = Path(metadata(result, "small", "hub_release")["folder"])
    assert {path.name for path in release.glob("*.safetensors")} == {"small.safetensors"}
    assert Path(metadata(result, "small", "lora")["weights"]).is_file()
