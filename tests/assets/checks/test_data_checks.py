"""Checks of datasets and crop plans on real folders: message, severity and images."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from PIL import Image

from assets.checks.data_checks import check_buckets, check_dataset
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.definitions import build_definitions
from tests.conftest import DATASET
from tests.support.photographs import PHOTOGRAPHS

IMAGES = ["astronaut", "camera", "chelsea", "coffee", "coins", "moon"]


def save_photograph(folder: Path, name: str, source: str, caption: str | None = None, **changes: Any) -> Path:
    """Save one of scikit-image's photographs with its caption; `size` and `quality` make it a near-duplicate."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(PHOTOGRAPHS / f"{source}.png") as photograph:
        image = photograph.convert("RGB").resize(changes.pop("size", (256, 256)))
    image.save(folder / name, **changes)
    (folder / name).with_suffix(".txt").write_text(f"a photo of {source}" if caption is None else caption)
    return folder / name


def evaluate(folder: Path, instance: dg.DagsterInstance) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """Return the result of every check of the dataset and aspect_buckets assets, by dataset and name."""
    definitions = build_definitions(folder.parent)
    result = dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(
            *[
                key
                for asset in definitions.assets or []
                for key in getattr(asset, "keys", [])
                if key.path[-1].endswith(("_dataset", "_aspect_buckets"))
            ]
        ),
        resources=dict(definitions.resources or {}),
        instance=instance,
    )
    assert result.success, "warnings do not block"
    return {
        ("/".join(check.asset_key.path[1:]), check.check_name): check
        for check in result.get_asset_check_evaluations()
    }


def check_image(check: dg.AssetCheckEvaluation) -> Image.Image:
    encoded = check.metadata["images"].value.split("base64,")[1].removesuffix(")")
    assert len(encoded) <= 400_000
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def count_tiles(sheet: Image.Image, image: Path) -> int:
    """Return how many tiles (160 x 160 pixels) of a contact sheet show an image."""
    tile = Image.open(image).convert("RGB").resize((16, 16))
    found = 0
    for top in range(8, sheet.height - 160, 208 - 8):
        for left in range(8, sheet.width - 160, 168):
            crop = sheet.crop((left, top, left + 160, top + 160)).convert("RGB").resize((16, 16))
            difference = sum(abs(a - b) for a, b in zip(crop.tobytes(), tile.tobytes(), strict=True))
            found += difference / 768 < 12
    return found


def test_check_dataset_valid_folder_passes_and_counts_files(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.3})
    for name in IMAGES:
        save_photograph(folder / "data", f"{name}.png", name)
    (folder / "data" / "notes.md").write_text("notes")
    (folder / "data" / "raw.cr2").write_bytes(b"raw")
    (folder / "data" / "cut.png").write_bytes((folder / "data" / "moon.png").read_bytes()[:500])
    checks = evaluate(folder, instance)
    leakage = checks.pop(("shapes_aspect_buckets", "no_eval_leakage"))
    assert (leakage.passed, leakage.severity) == (False, dg.AssetCheckSeverity.WARN), "0 of 0 is not a pass"
    assert str(leakage.description).startswith("There are no evaluation images to compare with the 6")
    assert [name for name, check in checks.items() if not check.passed] == []
    message = checks["shapes_dataset", "file_counts_consistent"].description
    assert message.startswith("9 found = 6 kept + 3 dropped (")
    for reason in ("1 not an image", "1 truncated", "1 image format .cr2 is not supported"):
        assert reason in message
    assert checks["shapes_dataset", "no_near_duplicates"].description == (
        "0 files are copies of others; 0 images are near-duplicates, in 0 groups."
    )
    assert (
        "6 images = 6 planned + 0 filtered out"
        in checks["shapes_aspect_buckets", "image_counts_consistent"].description
    )


def test_no_near_duplicates_copies_and_near_duplicates_lists_and_shows_them(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0})
    for name in IMAGES:
        save_photograph(folder / "data", f"{name}.png", name)
    save_photograph(folder / "data", "smaller.jpg", "coffee", size=(160, 160), quality=60)
    shutil.copy(folder / "data" / "moon.png", folder / "data" / "moon again.png")
    (folder / "data" / "moon again.txt").write_text("the moon again")
    save_photograph(folder / "data", "flat.png", "moon").unlink()
    Image.new("RGB", (256, 256), "red").save(folder / "data" / "flat.png")
    check = evaluate(folder, instance)["shapes_dataset", "no_near_duplicates"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "1 files are copies of others (moon again.png = moon.png)" in check.description
    assert "2 images are near-duplicates, in 1 groups (coffee.png ~ smaller.jpg)" in check.description
    assert "1 flat or evenly shaded images cannot be compared" in check.description
    sheet = check_image(check)
    assert (
        count_tiles(sheet, folder / "data" / "coffee.png"),
        count_tiles(sheet, folder / "data" / "moon.png"),
    ) == (
        2,
        2,
    )
    assert count_tiles(sheet, folder / "data" / "chelsea.png") == 0


def test_no_near_duplicates_search_off_reports_that_it_was_not_searched(instance, make_project):
    folder = make_project(
        images=0, dataset={"find_near_duplicates": False}, config={"eval_holdout_share": 0.3}
    )
    for name in IMAGES:
        save_photograph(folder / "data", f"{name}.png", name)
    save_photograph(folder / "data", "smaller.jpg", "coffee", size=(160, 160))
    save_photograph(folder / "data", "smaller2.jpg", "coffee", size=(150, 150))
    checks = evaluate(folder, instance)
    assert checks["shapes_dataset", "no_near_duplicates"].passed
    assert "find_near_duplicates is off" in checks["shapes_dataset", "no_near_duplicates"].description
    assert (
        "8 were compared by their bytes alone"
        in checks["shapes_aspect_buckets", "no_eval_leakage"].description
    )


def test_no_eval_leakage_near_duplicates_are_held_out_together(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.5})
    for name in IMAGES:
        for number in range(3):
            save_photograph(
                folder / "data", f"{name}_{number}.png", name, size=(256 - 16 * number, 256 - 16 * number)
            )
    check = evaluate(folder, instance)["shapes_aspect_buckets", "no_eval_leakage"]
    assert check.passed
    count, total = map(int, re.match(r"(\d+) of (\d+) evaluation images", check.description).groups())
    assert count == 0
    assert 3 <= total <= 9
    assert total % 3 == 0


def test_no_eval_leakage_split_group_is_reported_with_its_images(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.1})
    for number in range(9):
        save_photograph(folder / "data", f"{number}.png", "coffee", size=(256 - 8 * number, 256 - 8 * number))
    check = evaluate(folder, instance)["shapes_aspect_buckets", "no_eval_leakage"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description.startswith("1 of 1 evaluation images are trained on")
    assert " ~ " in check.description
    assert check_image(check).width < 400, "one pair per row"
    record = json.loads((folder / "output" / "held_out" / "shapes.json").read_text())
    assert len(record["keys"]) == 1


def write_datasets(folder: Path, *entries: dict[str, Any]) -> None:
    defaults = {**DATASET, "caption_strategy": "textfile"}
    (folder / "multidatabackend.json").write_text(json.dumps([{**defaults, **entry} for entry in entries]))


@pytest.mark.slow
def test_no_eval_leakage_from_each_training_dataset_lists_leaked_images(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=0)
    write_datasets(
        folder,
        {"id": "people", "instance_data_dir": "people"},
        {"id": "things", "instance_data_dir": "things"},
        {"id": "unseen", "instance_data_dir": "unseen", "dataset_type": "eval"},
    )
    for dataset, names in {"people": IMAGES[:2], "things": IMAGES[2:4], "unseen": IMAGES[4:]}.items():
        for name in names:
            save_photograph(folder / dataset, f"{name}.png", name)
    clean = evaluate(folder, instance)
    leakage_checks = ["no_eval_leakage_from_people", "no_eval_leakage_from_things"]
    assert all(clean["unseen_dataset", name].passed for name in leakage_checks)
    assert not [name for _, name in clean if name == "no_eval_leakage"], (
        "nothing is held out if there is an eval dataset"
    )

    versions = [version(instance, "small", f"unseen_{stage}") for stage in ("dataset", "aspect_buckets")]
    save_photograph(folder / "things", "again.jpg", "coins", size=(200, 200))
    shutil.copy(folder / "unseen" / "moon.png", folder / "things" / "moon.png")
    (folder / "things" / "moon.txt").write_text("the moon")
    leaking = evaluate(folder, instance)
    assert leaking["unseen_dataset", "no_eval_leakage_from_people"].passed
    check = leaking["unseen_dataset", "no_eval_leakage_from_things"]
    assert not check.passed
    assert "2 of 2 evaluation images" in check.description
    assert "(coins.png ~ again.jpg, moon.png = moon.png)" in check.description
    assert count_tiles(check_image(check), folder / "unseen" / "coins.png") == 2
    assert versions == [
        version(instance, "small", f"unseen_{stage}") for stage in ("dataset", "aspect_buckets")
    ]


def version(instance: dg.DagsterInstance, *path: str) -> str:
    event = instance.get_latest_materialization_event(dg.AssetKey(path))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization.tags["dagster/data_version"]


def scan_table(captions: list[list[str]], statuses: list[str] | None = None) -> pd.DataFrame:
    count = len(captions)
    return pd.DataFrame(
        {
            "path": [f"{number}.png" for number in range(count)],
            "key": [f"{number:064x}" for number in range(count)],
            "width": 64,
            "height": 64,
            "captions": captions,
            "caption_status": statuses or ["ok"] * count,
            "status": [
                "dropped" if status not in ("ok", "") else "kept" for status in statuses or ["ok"] * count
            ],
            "reason": [
                "no caption" if status not in ("ok", "") else "" for status in statuses or ["ok"] * count
            ],
            "phash": "",
        }
    )


def check_results(frame: pd.DataFrame, **settings: Any) -> dict[str, dg.AssetCheckResult]:
    defaults = {"id": "x", "instance_data_dir": "/nowhere", "resolution": 64, "caption_strategy": "textfile"}
    dataset = ImageDataset.model_validate(defaults | settings)
    return {str(check.check_name): check for check in check_dataset(frame, dataset, Path("/nowhere"))}


def test_no_shared_captions_many_images_reports_each_caption_with_its_count():
    captions = (
        [["a dog", "a brown dog"]] * 6 + [["a cat"]] * 4 + [[f"number {n}"] for n in range(5)] + [[""]] * 9
    )
    check = check_results(scan_table(captions))["no_shared_captions"]
    assert not check.passed
    assert "2 of 8 captions" in str(check.description)
    assert "'a dog' (6)" in str(check.description)
    assert "'a brown dog' (6)" in str(check.description)
    assert "a cat" not in str(check.description)
    assert check_results(scan_table([["a cat"]] * 4))["no_shared_captions"].passed
    copies = scan_table([["a dog"]] * 9)
    copies["key"] = "the same image"
    assert check_results(copies)["no_shared_captions"].passed


def test_no_shared_captions_instance_prompt_passes():
    for settings in ({"caption_strategy": "instanceprompt"}, {"only_instance_prompt": True}):
        check = check_results(scan_table([["a zorp"]] * 20), instance_prompt="a zorp", **settings)[
            "no_shared_captions"
        ]
        assert check.passed
        assert "as configured" in str(check.description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.assign(status=["dropped", *frame["status"][1:]]), "1 without a reason!"),
        (lambda frame: frame.assign(path=["1.png", *frame["path"][1:]]), "1 listed twice!"),
        (lambda frame: frame.assign(key=["", *frame["key"][1:]]), "1 kept although never read!"),
        (lambda frame: frame.assign(status=["lost", *frame["status"][1:]]), "3 found = 2 kept + 0 dropped"),
    ],
)
def test_file_counts_consistent_inconsistent_table_is_an_error(change, message):
    check = check_results(change(scan_table([["a"], ["b"], ["c"]])))["file_counts_consistent"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert message in str(check.description)


def test_captions_present_share_above_limit_fails_unless_empty_captions_are_allowed():
    few = scan_table([["a"]] * 9 + [[]], ["ok"] * 9 + ["missing"])
    many = scan_table([["a"]] * 5 + [[]] * 5, ["ok"] * 5 + ["missing"] * 5)
    assert check_results(few)["captions_present"].passed
    check = check_results(many)["captions_present"]
    assert not check.passed
    assert "5 of 10 images (50%)" in str(check.description)
    assert check_results(many, missing_captions="empty")["captions_present"].passed


def test_check_buckets_short_buckets_are_reported_with_their_counts():
    rows = pd.DataFrame(
        {
            "path": ["a", "a", "b", "c", "d"],
            "crop_index": [0, 1, 0, 0, 0],
            "bucket_w": [64, 64, 64, 128, 128],
            "bucket_h": 64,
            "split": ["train", "train", "train", "train", "eval"],
        }
    )
    kept = pd.DataFrame({"path": list("abcde")})
    dropped = pd.DataFrame({"path": ["e"], "reason": ["too small"]})
    checks = {check.check_name: check for check in check_buckets(rows, dropped, kept, batch_size=2)}
    assert checks["image_counts_consistent"].passed
    assert "4 planned + 1 filtered out (1 too small)" in str(checks["image_counts_consistent"].description)
    assert not checks["buckets_fill_a_batch"].passed
    assert str(checks["buckets_fill_a_batch"].description).startswith(
        "Buckets with fewer images than a batch of 2: 128x64 (1). An optimizer step"
    )


def test_no_unused_data_and_no_overlap_report_unused_settings_and_shared_images(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=0, config={"eval_holdout_share": 0})
    unused = {"caption_strategy": "filename", "crop": False, "crop_style": "center"}
    write_datasets(
        folder,
        {"id": "people", "instance_data_dir": "people", **unused},
        {"id": "prior", "instance_data_dir": "prior", "is_regularisation_data": True},
    )
    for name in IMAGES[:3]:
        save_photograph(folder / "people" / "4_people", f"{name}.png", name)
    for name in IMAGES[3:]:
        save_photograph(folder / "prior", f"{name}.png", name)
    assert evaluate(folder, instance)["prior_dataset", "no_overlap_with_people"].passed
    shutil.copy(folder / "people" / "4_people" / "camera.png", folder / "prior" / "same.png")
    (folder / "prior" / "same.txt").write_text("the same")
    checks = evaluate(folder, instance)
    check = checks["prior_dataset", "no_overlap_with_people"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == (
        "1 of 4 regularisation images are also ordinary training images of people (same.png = 4_people/camera.png). "
        "Remove them from one of the two."
    )
    assert checks["prior_dataset", "no_unused_data"].passed
    check = checks["people_dataset", "no_unused_data"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    event = instance.get_latest_materialization_event(dg.AssetKey(["small", "people_dataset"]))
    assert event is not None
    assert event.asset_materialization is not None
    unused = event.asset_materialization.metadata["unused_data"].value
    for words in (
        '"people".crop_style has no effect: crop is false',
        "3 text files are stored beside images and not read; write caption_strategy: textfile.",
        'folder 4_people (3 images): the repeats in its name, as kohya\'s trainers write them, are ignored; write "repeats": 3',
    ):
        assert words in str(check.description)
        assert words in str(unused)
