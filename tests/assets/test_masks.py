"""Holds: masks in the graph, from multidatabackend.json: pairs, names and overlays are shown, and an edited mask costs a training and no encoding."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from PIL import Image, ImageDraw

from assets.aspect_buckets import holdout_share
from resources.storage import read_parquet
from sdxl_pipeline.cli.main import main
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.data.scan.dataset_fingerprint import project_fingerprint
from sdxl_pipeline.definitions import build_definitions
from tests.assets.test_incremental import InProcessLauncher
from tests.conftest import DATASET, draw_image

STAGES = ("dataset", "aspect_buckets", "vae_latents", "text_embeds")
MASKS = {
    "id": "shape-masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "masks",
}


def draw_mask(folder: Path, image: Path, radius: int = 40) -> Path:
    """A white disc in the middle of an image's size, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(image) as opened:
        mask = Image.new("L", opened.size, 0)
    x, y = mask.width // 2, mask.height // 2
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    path = folder / image.name
    mask.save(path)
    return path


class Masked:
    """A project of masked images and regularisation images, materialized again and again."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder = instance, folder

    def run(self, *keys: str) -> dict[str, dict[str, Any]]:
        """What the assets of these keys, `/`-joined below the project, show, with their data version and checks."""
        definitions = build_definitions(self.folder.parent)
        wanted = [dg.AssetKey([self.folder.name, *key.split("/")]) for key in keys]
        result = dg.materialize(
            list(definitions.assets or []),
            selection=dg.AssetSelection.assets(*wanted),
            resources={**(definitions.resources or {}), "launcher": InProcessLauncher()},
            instance=self.instance,
            raise_on_error=False,
        )
        shown = {}
        for key in wanted:
            events = result.asset_materializations_for_node("__".join(key.path))
            if events:
                entries = {name: entry.value for name, entry in events[0].metadata.items()}
                version = {"version": (events[0].tags or {})["dagster/data_version"]}
                shown["/".join(key.path[1:])] = entries | version
        self.checks = {
            evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()
        }
        return shown

    def masks(self) -> dict[str, Any]:
        shown = self.run("shapes/dataset", "shape_masks/dataset", "shapes/masks")
        return shown["shapes/masks"] | {"files": shown["shape_masks/dataset"]}


@pytest.fixture
def masked(instance: dg.DagsterInstance, make_project: Callable[..., Path]) -> Masked:
    config = {"eval_holdout_share": 0, "evaluation_type": "none", "validation_disable": True}
    folder = make_project(images=6, config=config)
    for image in sorted((folder / "data").glob("*.png")):
        draw_mask(folder / "masks", image)
    for index in range(20, 23):
        draw_image(folder / "people", index)
    people = {**DATASET, "id": "people", "instance_data_dir": "people", "is_regularisation_data": True}
    entries = [{**DATASET, "conditioning_data": "shape-masks"}, MASKS, people]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    return Masked(instance, folder)


def test_pairs_are_counted_and_shown_with_their_overlays(masked):
    shown = masked.masks()
    assert shown["masked"] == 6
    jpeg = base64.b64decode(shown["sample"].split("base64,")[1].removesuffix(")"))
    assert jpeg.startswith(b"\xff\xd8")
    assert masked.checks["masks_paired"].passed
    assert masked.checks["may_lack_an_image"].passed
    assert (shown["files"]["found"], shown["files"]["kept"]) == (6, 6)
    pairs = read_parquet(Path(shown["path"]))
    assert pairs["path"].tolist() == pairs["mask_path"].tolist()


def test_a_image_without_mask_stops_the_training_with_its_name_unless_that_is_meant(masked):
    (masked.folder / "masks" / "image_03.png").unlink()
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png").rename(
        masked.folder / "masks" / "stray.png"
    )
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png")
    masked.masks()
    refused = masked.checks["masks_paired"]
    assert not refused.passed
    assert refused.blocking
    assert "image_03.png: no mask" in refused.description
    assert "missing_masks" in refused.description
    assert "stray.png: mask without image" in masked.checks["may_lack_an_image"].description
    assert not masked.checks["may_lack_an_image"].blocking

    file = masked.folder / "multidatabackend.json"
    first, *others = json.loads(file.read_text())
    file.write_text(json.dumps([{**first, "missing_masks": "unmasked"}, *others]))
    assert masked.masks()["masked"] == 5
    assert masked.checks["masks_paired"].passed


def test_a_mask_of_another_shape_is_refused_and_a_damaged_one_is_named(masked):
    Image.new("L", (50, 51), 255).save(masked.folder / "masks" / "image_01.png")
    (masked.folder / "masks" / "image_02.png").write_bytes(b"\x89PNG no more")
    shown = masked.masks()
    told = masked.checks["masks_paired"].description
    assert "image_01.png: the mask has another shape" in told
    assert "image_02.png: no mask" in told
    assert shown["files"]["kept"] == 5
    reasons = {record.data["names"] for record in shown["files"]["dropped"].records}
    assert "image_02.png" in reasons


def test_an_edited_mask_changes_the_pairs_and_a_renamed_pair_does_not(masked):
    before = masked.masks()["version"]
    for folder in ("data", "masks"):
        for path in (masked.folder / folder).glob("image_04.*"):
            path.rename(path.with_stem("renamed"))
    assert masked.masks()["version"] == before
    draw_mask(masked.folder / "masks", masked.folder / "data" / "renamed.png", radius=20)
    assert masked.masks()["version"] != before


def test_the_sensor_sees_an_edited_mask(masked):
    before = project_fingerprint(load_project(masked.folder))
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png", radius=11)
    assert project_fingerprint(load_project(masked.folder)) != before


def test_masks_stand_upstream_of_the_training_and_of_no_latents(masked):
    graph = build_definitions(masked.folder.parent).get_repository_def().asset_graph

    def upstream(*key: str) -> set[dg.AssetKey]:
        return graph.get(dg.AssetKey(["small", *key])).parent_keys

    masks = dg.AssetKey(["small", "shapes", "masks"])
    assert masks in upstream("lora")
    assert upstream("shapes", "masks") == {
        dg.AssetKey(["small", "shapes", "dataset"]),
        dg.AssetKey(["small", "shape_masks", "dataset"]),
    }
    for stage in STAGES:
        assert masks not in upstream("shapes", stage)
    assert masks not in upstream("evaluation")


def test_regularisation_images_are_not_held_out(masked):
    config = masked.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eval_holdout_share": 0.25}))
    project = load_project(masked.folder)
    assert [holdout_share(project, dataset) for dataset in project.datasets] == [0.25, 0.0]


def test_the_doctor_says_what_each_dataset_is_for(masked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", str(masked.folder)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "train, masked by shape-masks" in lines["shapes"]
    assert "preserve" in lines["people"]
    assert "mask" in lines["shape-masks"].removeprefix(" shape-masks")


@pytest.mark.slow
def test_an_edited_mask_costs_a_training_and_no_encoding(masked):
    datasets = [f"{dataset}/{stage}" for dataset in ("shapes", "people") for stage in STAGES]
    keys = ["base_model", *datasets, "shape_masks/dataset", "shapes/masks", "lora"]
    first = masked.run(*keys)
    assert "3 steps" in first["lora"]["summary"]
    assert first["lora"]["masked_datasets"] == "shapes"
    assert first["lora"]["regularisation_datasets"] == "people"
    assert first["shapes/vae_latents"]["encoded"] == 6
    assert first["people/aspect_buckets"]["eval"] == 0
    assert "reused" in masked.run(*keys)["lora"]["summary"]

    path = draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png", radius=15)
    edited = masked.run(*keys)
    assert "3 steps" in edited["lora"]["summary"]
    assert edited["lora"]["identity"] != first["lora"]["identity"]
    assert edited["lora"]["sha256"] != first["lora"]["sha256"]
    for dataset in ("shapes", "people"):
        assert edited[f"{dataset}/vae_latents"]["encoded"] == 0
        assert edited[f"{dataset}/vae_latents"]["version"] == first[f"{dataset}/vae_latents"]["version"]
    draw_mask(path.parent, masked.folder / "data" / "image_00.png")
    again = masked.run(*keys)
    assert again["lora"]["identity"] == first["lora"]["identity"]
    assert "reused" in again["lora"]["summary"]
