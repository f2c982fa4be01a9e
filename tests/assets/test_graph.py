"""The whole graph on a small project: every stage is real, shows its images, and does no work twice."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from safetensors.torch import load_file, save_file

from assets import summary
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.release.export import SETTINGS_FILE
from tests.conftest import draw_image

OBJECTIVE = {
    "snr_gamma": 5.0,
    "offset_noise": True,
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 1.0,
}
WATCHED = {
    "user_prompt_library": "prompts.json",
    "validation_resolution": "64x64,96x64",
    "validation_preview": True,
    "webhook_config": "webhooks.json",
}
DATASET = ["dataset", "aspect_buckets", "vae_latents", "text_embeds"]


def materialize(
    instance: dg.DagsterInstance, folder: Path, *stages: str, run_config: dict[str, Any] | None = None
) -> dg.ExecuteInProcessResult:
    """Run the named stages of the project at `folder`, or all of them."""
    definitions = build_definitions(folder.parent)
    name = folder.name
    keys = [dg.AssetKey([name, "shapes", s] if s in DATASET else [name, s]) for s in stages]
    return dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(*keys) if keys else None,
        resources=dict(definitions.resources or {}),
        instance=instance,
        run_config=run_config,
    )


def metadata(result: dg.ExecuteInProcessResult, *key: str) -> dict[str, Any]:
    event = result.asset_materializations_for_node("__".join(key))[0]
    return {name: value.value for name, value in event.metadata.items()}


def test_graph_makes_a_released_lora_and_a_second_run_does_no_work(
    instance: dg.DagsterInstance,
    make_project: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_project(config=OBJECTIVE | WATCHED)
    (folder / "prompts.json").write_text(json.dumps({"赤い円": "a red circle", "青い円": "a blue circle"}))
    nobody = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:9/hook"}  # which stops no training
    (folder / "webhooks.json").write_text(json.dumps(nobody))
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    data_before = {path: path.read_bytes() for path in (folder / "data").rglob("*")}

    first = materialize(instance, folder)
    assert first.success
    assert all(check.passed for check in first.get_asset_check_evaluations())
    weights = Path(metadata(first, "small", "lora")["weights"])
    release = Path(metadata(first, "small", "hub_release")["folder"])
    assert load_file(weights)
    card = (release / "README.md").read_text()
    objective = metadata(first, "small", "lora")["objective"]
    for key, value in OBJECTIVE.items():
        assert f"| {key} | {value} |" in objective
        assert f"| `{key}` | {value} |" in card
    assert (release / weights.name).read_bytes() == weights.read_bytes()
    checked = {check.check_name: check.description for check in first.get_asset_check_evaluations()}
    for name in ("may_load_everywhere", "loads_everywhere"):
        assert "136 of 136 layers in small.safetensors have kohya's names" in str(checked[name])
    kohya = Path(metadata(first, "small", "lora")["kohya_weights"])
    assert (release / "small.safetensors").read_bytes() == kohya.read_bytes()
    assert {name.partition("_input")[0] for name in load_file(kohya) if "_input" in name} == {"lora_unet"}
    assert metadata(first, "small", "evaluation")["eval_loss_base"] > 0
    images = {
        f"{name}_{size}.png" for name in ("validation", "赤い円", "青い円") for size in ("64x64", "96x64")
    }
    for place in (weights.parent / "validation" / "step-00000003", release / "images"):
        drawn = {path.name: path.read_bytes() for path in place.iterdir()}
        assert drawn.keys() == images
        assert len(set(drawn.values())) == len(images)
    assert str(folder) not in (release / SETTINGS_FILE).read_text()

    summary.main("small")
    told = capsys.readouterr().out
    assert "8 encoded, 0 reused" in told
    assert "training: 3 steps" in told
    for shown in (str(weights), str(kohya), str(release), "gallery.png", "report.md", "make ui"):
        assert shown in told

    second = materialize(instance, folder)
    assert metadata(second, "small", "shapes", "vae_latents")["encoded"] == 0
    assert metadata(second, "small", "shapes", "vae_latents")["reused"] == 8
    assert metadata(second, "small", "shapes", "text_embeds")["encoded"] == 0
    assert "reused" in metadata(second, "small", "lora")["summary"]
    assert metadata(second, "small", "evaluation")["reused"]
    summary.main("small")
    told = capsys.readouterr().out
    assert "0 encoded, 8 reused" in told
    assert "nothing to do" in told
    for key in (["small", "lora"], ["small", "evaluation"], ["small", "shapes", "vae_latents"]):
        versions = [
            result.asset_materializations_for_node("__".join(key))[0].tags["dagster/data_version"]
            for result in (first, second)
        ]
        assert versions[0] == versions[1]
    assert {path: path.read_bytes() for path in (folder / "data").rglob("*")} == data_before


def test_every_stage_shows_its_image_in_at_most_300_kilobytes(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    result = materialize(instance, make_project())
    images = {
        ("small", "shapes", "dataset"): ["sample", "resolutions", "caption_lengths"],
        ("small", "shapes", "aspect_buckets"): ["buckets"],
        ("small", "shapes", "vae_latents"): ["sample"],
        ("small", "lora"): ["loss_curve", "validation"],
        ("small", "evaluation"): ["gallery", "eval_loss_by_timestep"],
        ("small", "hub_release"): ["gallery"],
    }
    for key, names in images.items():
        shown = metadata(result, *key)
        for name in names:
            encoded = shown[name].split("base64,")[1].removesuffix(")")
            jpeg = base64.b64decode(encoded)
            assert jpeg.startswith(b"\xff\xd8")
            assert len(jpeg) <= 300_000


def test_one_new_image_and_one_edited_caption_cost_one_encoding_each(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    stages = ("base_model", *DATASET)
    first = materialize(instance, folder, *stages)
    assert metadata(first, "small", "shapes", "vae_latents")["encoded"] == 8
    # Eight captions, the validation prompt, the negative prompt and the empty prompt.
    assert metadata(first, "small", "shapes", "text_embeds")["encoded"] == 11

    draw_image(folder / "data", 8)
    added = materialize(instance, folder, *stages)
    assert metadata(added, "small", "shapes", "vae_latents")["encoded"] == 1
    assert metadata(added, "small", "shapes", "text_embeds")["encoded"] == 1

    (folder / "data" / "image_03.txt").write_text("an image with another caption")
    edited = materialize(instance, folder, *stages)
    assert metadata(edited, "small", "shapes", "vae_latents")["encoded"] == 0
    assert metadata(edited, "small", "shapes", "text_embeds")["encoded"] == 1

    for suffix in (".png", ".txt"):
        (folder / "data" / f"image_03{suffix}").rename(folder / "data" / f"renamed{suffix}")
    renamed = materialize(instance, folder, *stages)
    assert metadata(renamed, "small", "shapes", "vae_latents")["encoded"] == 0
    assert metadata(renamed, "small", "shapes", "text_embeds")["encoded"] == 0


def test_another_vae_encodes_all_latents_again_and_no_text(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_project(images=4)
    stages = ("base_model", *DATASET)
    materialize(instance, folder, *stages)

    vae = tmp_path / "another_vae"
    shutil.copytree(BUNDLED_MODEL / "vae", vae)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"] += 0.01
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_vae_model_name_or_path": str(vae)}))
    changed = materialize(instance, folder, *stages)
    assert metadata(changed, "small", "shapes", "vae_latents")["encoded"] == 4
    assert metadata(changed, "small", "shapes", "text_embeds")["encoded"] == 0


def test_launchpad_settings_stand_above_the_config_file(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=4, config={"eval_holdout_share": 0.0})
    materialize(instance, folder, "base_model", *DATASET)
    run_config = {"ops": {"small__lora": {"config": {"settings": {"max_train_steps": 2, "lora_rank": 2}}}}}
    result = materialize(instance, folder, "lora", run_config=run_config)
    shown = metadata(result, "small", "lora")
    assert shown["steps"] == 2
    ranks = {min(tensor.shape) for tensor in load_file(shown["weights"]).values()}
    assert ranks == {2}


def test_push_without_a_token_fails_before_any_training(
    instance: dg.DagsterInstance,
    make_project: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
    folder = make_project(
        images=4, config={"push_to_hub": True, "hub_model_id": "someone/lora", "eval_holdout_share": 0}
    )
    materialize(instance, folder, "base_model", *DATASET)
    with pytest.raises(Exception, match="HF_TOKEN"):
        materialize(instance, folder, "lora")
    assert not list((folder / "output").rglob("metrics.jsonl"))


def test_a_dataset_without_usable_images_stops_before_the_encoders(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=1)
    (folder / "data" / "image_00.txt").unlink()
    definitions = build_definitions(folder.parent)
    result = dg.materialize(
        list(definitions.assets or []),
        resources=dict(definitions.resources or {}),
        instance=instance,
        raise_on_error=False,
    )
    assert not result.success
    failed = {check.check_name for check in result.get_asset_check_evaluations() if not check.passed}
    assert {"usable_images", "captions_present"} <= failed
    assert not result.asset_materializations_for_node("small__shapes__vae_latents")
