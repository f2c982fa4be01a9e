"""The whole graph on a small project: results, metadata, reuse on a second run, and blocking failures."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.defs_state.base import set_defs_state_storage
from safetensors.torch import load_file, save_file

from assets import summary
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.models.base_model import BUNDLED_MODEL
from sdxl_pipeline.release.export import SETTINGS_FILE
from tests.conftest import draw_image, write_project
from tests.support.asset_graph import DATASET_STAGES, materialize, metadata

OBJECTIVE = {
    "snr_gamma": 5.0,
    "offset_noise": True,
    "scheduled_sampling_max_step_offset": 2,
    "scheduled_sampling_probability": 1.0,
}
OBSERVERS = {
    "user_prompt_library": "prompts.json",
    "validation_resolution": "64x64,96x64",
    "validation_preview": True,
    "webhook_config": "webhooks.json",
}


@dataclass(frozen=True)
class GraphRuns:
    """Two consecutive runs of the whole graph of one project, and what they printed and left."""

    folder: Path
    first: dg.ExecuteInProcessResult
    second: dg.ExecuteInProcessResult
    first_summary: str
    second_summary: str
    data_before: dict[Path, bytes]

    def path(self, asset: str, entry: str) -> Path:
        """Return a path from the metadata of an asset of the first run."""
        return Path(metadata(self.first, "small", asset)[entry])

    def checks(self) -> dict[str, dg.AssetCheckEvaluation]:
        """Return the check results of the first run by name."""
        return {check.check_name: check for check in self.first.get_asset_check_evaluations()}


def print_summary() -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        summary.main("small")
    return output.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GraphRuns]:
    folder = write_project(tmp_path_factory.mktemp("graph"), config=OBJECTIVE | OBSERVERS)
    (folder / "prompts.json").write_text(json.dumps({"赤い円": "a red circle", "青い円": "a blue circle"}))
    unreachable = {
        "webhook_type": "raw",
        "callback_url": "http://127.0.0.1:9/hook",
    }  # does not stop the training
    (folder / "webhooks.json").write_text(json.dumps(unreachable))
    data_before = {path: path.read_bytes() for path in (folder / "data").rglob("*")}
    with (
        pytest.MonkeyPatch.context() as environment,
        set_defs_state_storage(None),
        dg.instance_for_test() as instance,
    ):
        environment.setenv("SDXL_PIPELINE_STORAGE", str(tmp_path_factory.mktemp("storage")))
        environment.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
        environment.setenv("SDXL_HARDWARE", "cpu")
        first = materialize(instance, folder, in_process=False)
        first_summary = print_summary()
        second = materialize(instance, folder)
        yield GraphRuns(folder, first, second, first_summary, print_summary(), data_before)


def test_graph_first_run_succeeds_and_all_checks_pass(runs: GraphRuns) -> None:
    assert runs.first.success
    assert all(check.passed for check in runs.first.get_asset_check_evaluations())
    assert metadata(runs.first, "small", "evaluation")["eval_loss_base"] > 0


def test_graph_objective_settings_are_in_metadata_and_model_card(runs: GraphRuns) -> None:
    card = (runs.path("hub_release", "folder") / "README.md").read_text()
    objective = metadata(runs.first, "small", "lora")["objective"]
    for key, value in OBJECTIVE.items():
        assert f"| {key} | {value} |" in objective
        assert f"| `{key}` | {value} |" in card


def test_graph_release_contains_the_trained_files(runs: GraphRuns) -> None:
    release, weights = runs.path("hub_release", "folder"), runs.path("lora", "weights")
    assert load_file(weights)
    assert (release / weights.name).read_bytes() == weights.read_bytes()
    kohya = runs.path("lora", "kohya_weights")
    assert (release / "small.safetensors").read_bytes() == kohya.read_bytes()
    assert {name.partition("_input")[0] for name in load_file(kohya) if "_input" in name} == {"lora_unet"}
    assert str(runs.folder) not in (release / SETTINGS_FILE).read_text()


@pytest.mark.parametrize("name", ["export_formats_valid", "release_formats_valid"])
def test_graph_format_checks_count_the_kohya_layers(runs: GraphRuns, name: str) -> None:
    message = str(runs.checks()[name].description)
    assert "136 of 136 layers in small.safetensors have kohya's names" in message


def test_graph_validation_and_release_have_an_image_per_prompt_and_size(runs: GraphRuns) -> None:
    expected = {
        f"{name}_{size}.png" for name in ("validation", "赤い円", "青い円") for size in ("64x64", "96x64")
    }
    validation = runs.path("lora", "weights").parent / "validation" / "step-00000003"
    for folder in (validation, runs.path("hub_release", "folder") / "images"):
        images = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert images.keys() == expected
        assert len(set(images.values())) == len(expected)


def test_summary_first_run_prints_work_and_paths(runs: GraphRuns) -> None:
    assert "8 encoded, 0 reused" in runs.first_summary
    assert "training: 3 steps" in runs.first_summary
    paths = [
        str(runs.path("lora", "weights")),
        str(runs.path("lora", "kohya_weights")),
        str(runs.path("hub_release", "folder")),
    ]
    for text in (*paths, "gallery.png", "report.md", "make ui"):
        assert text in runs.first_summary


def test_summary_second_run_prints_reuse(runs: GraphRuns) -> None:
    assert "0 encoded, 8 reused" in runs.second_summary
    assert "nothing to do" in runs.second_summary


def test_graph_second_run_reuses_everything(runs: GraphRuns) -> None:
    assert metadata(runs.second, "small", "shapes_vae_latents")["encoded"] == 0
    assert metadata(runs.second, "small", "shapes_vae_latents")["reused"] == 8
    assert metadata(runs.second, "small", "shapes_text_embeds")["encoded"] == 0
    assert "reused" in metadata(runs.second, "small", "lora")["summary"]
    assert metadata(runs.second, "small", "evaluation")["reused"]


@pytest.mark.parametrize(
    "key", [("small", "lora"), ("small", "evaluation"), ("small", "shapes_vae_latents")], ids="/".join
)
def test_graph_second_run_keeps_data_versions(runs: GraphRuns, key: tuple[str, ...]) -> None:
    versions = [
        result.asset_materializations_for_node("__".join(key))[0].tags["dagster/data_version"]
        for result in (runs.first, runs.second)
    ]
    assert versions[0] == versions[1]


def test_graph_does_not_change_the_data(runs: GraphRuns) -> None:
    assert {path: path.read_bytes() for path in (runs.folder / "data").rglob("*")} == runs.data_before


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (("small", "shapes_dataset"), ["sample", "resolutions", "caption_lengths"]),
        (("small", "shapes_aspect_buckets"), ["buckets"]),
        (("small", "shapes_vae_latents"), ["sample"]),
        (("small", "lora"), ["loss_curve", "validation"]),
        (("small", "evaluation"), ["gallery", "eval_loss_by_timestep"]),
        (("small", "hub_release"), ["gallery"]),
    ],
)
def test_metadata_images_are_jpegs_of_at_most_300_kilobytes(
    runs: GraphRuns, key: tuple[str, ...], names: list[str]
) -> None:
    entries = metadata(runs.first, *key)
    for name in names:
        encoded = entries[name].split("base64,")[1].removesuffix(")")
        jpeg = base64.b64decode(encoded)
        assert jpeg.startswith(b"\xff\xd8")
        assert len(jpeg) <= 300_000


@pytest.mark.slow
def test_graph_new_image_and_edited_caption_encode_one_entry_each(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project()
    stages = ("base_model", *DATASET_STAGES)
    first = materialize(instance, folder, *stages)
    assert metadata(first, "small", "shapes_vae_latents")["encoded"] == 8
    # Eight captions, the validation prompt, the negative prompt and the empty prompt.
    assert metadata(first, "small", "shapes_text_embeds")["encoded"] == 11

    draw_image(folder / "data", 8)
    added = materialize(instance, folder, *stages)
    assert metadata(added, "small", "shapes_vae_latents")["encoded"] == 1
    assert metadata(added, "small", "shapes_text_embeds")["encoded"] == 1

    (folder / "data" / "image_03.txt").write_text("an image with another caption")
    edited = materialize(instance, folder, *stages)
    assert metadata(edited, "small", "shapes_vae_latents")["encoded"] == 0
    assert metadata(edited, "small", "shapes_text_embeds")["encoded"] == 1

    for suffix in (".png", ".txt"):
        (folder / "data" / f"image_03{suffix}").rename(folder / "data" / f"renamed{suffix}")
    renamed = materialize(instance, folder, *stages)
    assert metadata(renamed, "small", "shapes_vae_latents")["encoded"] == 0
    assert metadata(renamed, "small", "shapes_text_embeds")["encoded"] == 0


@pytest.mark.slow
def test_graph_another_vae_encodes_all_latents_and_no_text(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_project(images=4)
    stages = ("base_model", *DATASET_STAGES)
    materialize(instance, folder, *stages)

    vae = tmp_path / "another_vae"
    shutil.copytree(BUNDLED_MODEL / "vae", vae)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"] += 0.01
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_vae_model_name_or_path": str(vae)}))
    changed = materialize(instance, folder, *stages)
    assert metadata(changed, "small", "shapes_vae_latents")["encoded"] == 4
    assert metadata(changed, "small", "shapes_text_embeds")["encoded"] == 0


def test_lora_launchpad_settings_override_the_config_file(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=4, config={"eval_holdout_share": 0.0})
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    run_config = {"ops": {"small__lora": {"config": {"settings": {"max_train_steps": 2, "lora_rank": 2}}}}}
    result = materialize(instance, folder, "lora", run_config=run_config)
    shown = metadata(result, "small", "lora")
    assert shown["steps"] == 2
    ranks = {min(tensor.shape) for tensor in load_file(shown["weights"]).values()}
    assert ranks == {2}


def test_lora_push_without_token_fails_before_training(
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
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    with pytest.raises(Exception, match="HF_TOKEN"):
        materialize(instance, folder, "lora")
    assert not list((folder / "output").rglob("metrics.jsonl"))


def test_graph_dataset_without_usable_images_blocks_the_encoders(
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
    assert not result.asset_materializations_for_node("small__shapes_vae_latents")
