"""Holds: the whole graph with other adapters than a LoRA, from config.json to the release, and a second project that starts from a first's file."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from tests.assets.test_graph import materialize, metadata

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
        ({"lora_type": "lycoris", "lycoris_config": "lycoris_config.json"}, "LoKr (LyCORIS)"),
        pytest.param({"use_dora": True}, "DoRA of rank 4", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_goes_through_the_graph(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], config: dict, kind: str
) -> None:
    folder = make_project(config=config)
    (folder / "lycoris_config.json").write_text(json.dumps(LOKR))
    result = materialize(instance, folder)
    assert result.success
    checked = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert checked["weights_sound"].passed
    trained = metadata(result, "small", "lora")
    assert trained["adapter"] == kind
    release = Path(metadata(result, "small", "hub_release")["folder"])
    weights = Path(trained["weights"])
    assert (release / "pytorch_lora_weights.safetensors").read_bytes() == weights.read_bytes()
    card = (release / "README.md").read_text()
    assert kind in card
    assert ("create_lycoris_from_weights" in card) == ("LyCORIS" in kind)

    second = make_project(name="second", config={**config, "init_lora": str(weights)})
    (second / "lycoris_config.json").write_text(json.dumps(LOKR))
    again = materialize(
        instance, second, "base_model", "dataset", "aspect_buckets", "vae_latents", "text_embeds", "lora"
    )
    assert again.success
    assert metadata(again, "second", "lora")["started_from_sha256"] == trained["sha256"]
