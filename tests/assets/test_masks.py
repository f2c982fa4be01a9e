"""Masks in the asset graph: pairs, metadata, overlays and checks; an edited mask causes a training and no encoding."""

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
from tests.conftest import DATASET, draw_image
from tests.support.asset_graph import DATASET_STAGES, InProcessStageClient

MASKS = {
    "id": "shape-masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "masks",
}


def draw_mask(folder: Path, image: Path, radius: int = 40) -> Path:
    """Save a mask with a white disc in the centre, in the size and under the name of an image."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(image) as opened:
        mask = Image.new("L", opened.size, 0)
    x, y = mask.width // 2, mask.height // 2
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    path = folder / image.name
    mask.save(path)
    return path


class MaskedProject:
    """A project with masked images and regularisation images, for repeated materializations."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path) -> None:
        self.instance, self.folder = instance, folder

    def run(self, *keys: str) -> dict[str, dict[str, Any]]:
        """Materialize the assets `keys` (names in the project) and return the metadata and data version of each; keep the checks."""
        definitions = build_definitions(self.folder.parent)
        asset_keys = [dg.AssetKey([self.folder.name, key]) for key in keys]
        result = dg.materialize(
            list(definitions.assets or []),
            selection=dg.AssetSelection.assets(*asset_keys),
            resources={**(definitions.resources or {}), "launcher": InProcessStageClient()},
            instance=self.instance,
            raise_on_error=False,
        )
        shown = {}
        for key in asset_keys:
            events = result.asset_materializations_for_node("__".join(key.path))
            if events:
                entries = {name: entry.value for name, entry in events[0].metadata.items()}
                version = {"version": (events[0].tags or {})["dagster/data_version"]}
                shown[key.path[-1]] = entries | version
        self.checks = {
            evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()
        }
        return shown

    def masks(self) -> dict[str, Any]:
        shown = self.run("shapes_dataset", "shape_masks_dataset", "shapes_masks")
        return shown["shapes_masks"] | {"files": shown["shape_masks_dataset"]}


@pytest.fixture
def masked(instance: dg.DagsterInstance, make_project: Callable[..., Path]) -> MaskedProject:
    config = {"eval_holdout_share": 0, "evaluation_type": "none", "validation_disable": True}
    folder = make_project(images=6, config=config)
    for image in sorted((folder / "data").glob("*.png")):
        draw_mask(folder / "masks", image)
    for index in range(20, 23):
        draw_image(folder / "people", index)
    people = {**DATASET, "id": "people", "instance_data_dir": "people", "is_regularisation_data": True}
    entries = [{**DATASET, "conditioning_data": "shape-masks"}, MASKS, people]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    return MaskedProject(instance, folder)


def test_masks_all_paired_metadata_has_count_and_overlays(masked):
    shown = masked.masks()
    assert shown["masked"] == 6
    jpeg = base64.b64decode(shown["sample"].split("base64,")[1].removesuffix(")"))
    assert jpeg.startswith(b"\xff\xd8")
    assert masked.checks["masks_paired"].passed
    assert masked.checks["no_unused_masks"].passed
    assert (shown["files"]["found"], shown["files"]["kept"]) == (6, 6)
    pairs = read_parquet(Path(shown["path"]))
    assert pairs["path"].tolist() == pairs["mask_path"].tolist()


def test_masks_paired_missing_mask_blocks_unless_missing_masks_is_unmasked(masked):
    (masked.folder / "masks" / "image_03.png").unlink()
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png").rename(
        masked.folder / "masks" / "stray.png"
    )
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png")
    masked.masks()
    check = masked.checks["masks_paired"]
    assert not check.passed
    assert check.blocking
    assert "image_03.png: no mask" in check.description
    assert "missing_masks" in check.description
    assert "stray.png: mask without image" in masked.checks["no_unused_masks"].description
    assert not masked.checks["no_unused_masks"].blocking

    file = masked.folder / "multidatabackend.json"
    first, *others = json.loads(file.read_text())
    file.write_text(json.dumps([{**first, "missing_masks": "unmasked"}, *others]))
    assert masked.masks()["masked"] == 5
    assert masked.checks["masks_paired"].passed


def test_masks_paired_other_aspect_ratio_or_corrupt_mask_is_reported(masked):
    Image.new("L", (50, 51), 255).save(masked.folder / "masks" / "image_01.png")
    (masked.folder / "masks" / "image_02.png").write_bytes(b"\x89PNG no more")
    shown = masked.masks()
    message = masked.checks["masks_paired"].description
    assert "image_01.png: the mask has another shape" in message
    assert "image_02.png: no mask" in message
    assert shown["files"]["kept"] == 5
    reasons = {record.data["names"] for record in shown["files"]["dropped"].records}
    assert "image_02.png" in reasons


@pytest.mark.slow
def test_masks_data_version_changes_with_an_edit_and_not_with_a_rename(masked):
    before = masked.masks()["version"]
    for folder in ("data", "masks"):
        for path in (masked.folder / folder).glob("image_04.*"):
            path.rename(path.with_stem("renamed"))
    assert masked.masks()["version"] == before
    draw_mask(masked.folder / "masks", masked.folder / "data" / "renamed.png", radius=20)
    assert masked.masks()["version"] != before


def test_project_fingerprint_edited_mask_changes_it(masked):
    before = project_fingerprint(load_project(masked.folder))
    draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png", radius=11)
    assert project_fingerprint(load_project(masked.folder)) != before


def test_masks_are_upstream_of_the_training_set_and_of_no_cache(masked):
    graph = build_definitions(masked.folder.parent).get_repository_def().asset_graph

    def upstream(name: str) -> set[dg.AssetKey]:
        return graph.get(dg.AssetKey(["small", name])).parent_keys

    masks = dg.AssetKey(["small", "shapes_masks"])
    assert masks in upstream("training_set")
    assert upstream("shapes_masks") == {
        dg.AssetKey(["small", "shapes_dataset"]),
        dg.AssetKey(["small", "shape_masks_dataset"]),
    }
    for stage in DATASET_STAGES:
        assert masks not in upstream(f"shapes_{stage}")
    assert masks not in upstream("evaluation")


def test_holdout_share_regularisation_dataset_is_zero(masked):
    config = masked.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eval_holdout_share": 0.25}))
    project = load_project(masked.folder)
    assert [holdout_share(project, dataset) for dataset in project.datasets] == [0.25, 0.0]


def test_doctor_shows_masked_and_regularisation_datasets(masked, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", str(masked.folder)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "train, masked by shape-masks" in lines["shapes"]
    assert "preserve" in lines["people"]
    assert "mask" in lines["shape-masks"].removeprefix(" shape-masks")


@pytest.mark.slow
def test_lora_edited_mask_trains_again_without_encoding(masked):
    datasets = [f"{dataset}_{stage}" for dataset in ("shapes", "people") for stage in DATASET_STAGES]
    keys = ["base_model", *datasets, "shape_masks_dataset", "shapes_masks", "training_set", "lora"]
    first = masked.run(*keys)
    assert "3 steps" in first["lora"]["summary"]
    assert first["lora"]["masked_datasets"] == "shapes"
    assert first["lora"]["regularisation_datasets"] == "people"
    assert first["shapes_vae_latents"]["encoded"] == 6
    assert first["people_aspect_buckets"]["eval"] == 0
    assert "reused" in masked.run(*keys)["lora"]["summary"]

    path = draw_mask(masked.folder / "masks", masked.folder / "data" / "image_00.png", radius=15)
    edited = masked.run(*keys)
    assert "3 steps" in edited["lora"]["summary"]
    assert edited["lora"]["identity"] != first["lora"]["identity"]
    assert edited["lora"]["sha256"] != first["lora"]["sha256"]
    for dataset in ("shapes", "people"):
        assert edited[f"{dataset}_vae_latents"]["encoded"] == 0
        assert edited[f"{dataset}_vae_latents"]["version"] == first[f"{dataset}_vae_latents"]["version"]
    draw_mask(path.parent, masked.folder / "data" / "image_00.png")
    again = masked.run(*keys)
    assert again["lora"]["identity"] == first["lora"]["identity"]
    assert "reused" in again["lora"]["summary"]
