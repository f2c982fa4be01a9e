"""The whole graph with a full UNet, and with text encoders: training, checks, evaluation and release."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from assets import summary
from tests.support.asset_graph import materialize, metadata

pytestmark = pytest.mark.slow


def test_graph_full_unet_is_trained_evaluated_and_released(
    instance: dg.DagsterInstance,
    make_project: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # enough steps to be better than the base model, which a blocking check requires
    settings = {"model_type": "full", "lora_rank": 16, "learning_rate": 1e-5, "max_train_steps": 6}
    folder = make_project(config=settings)
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    result = materialize(instance, folder)
    assert result.success
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert checks["weights_valid"].passed
    release = Path(metadata(result, "small", "hub_release")["folder"])
    assert UNet2DConditionModel.from_pretrained(release, subfolder="unet", use_safetensors=True)
    assert "UNet2DConditionModel.from_pretrained" in (release / "README.md").read_text()
    names = {name.split(".")[0] for name in load_file(release / "small.safetensors")}
    assert names == {"model", "first_stage_model", "conditioner"}, "a single-file checkpoint"
    shown = metadata(result, "small", "hub_release")
    assert "small.safetensors" in shown["files"]
    assert "](data:image/jpeg;base64," in shown["model_card"]
    assert ".png)" not in shown["model_card"]
    summary.main("small")
    assert "trained UNet" in capsys.readouterr().out


def test_graph_trained_text_encoders_defer_the_text_cache(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(config={"train_text_encoder": True, "text_encoder_lr": 1e-4})
    result = materialize(instance, folder)
    assert result.success
    texts = metadata(result, "small", "shapes_text_embeds")
    assert (texts["encoded"], texts["reused"]) == (0, 0)
    assert texts["deferred"] > 0
    tensors = load_file(metadata(result, "small", "lora")["weights"])
    assert {name.split(".")[0] for name in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    release = Path(metadata(result, "small", "hub_release")["folder"])
    assert "of both text encoders" in (release / "README.md").read_text()
