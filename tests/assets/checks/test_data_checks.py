"""Checks of datasets and crop plans on real folders: what is told, that it is a warning, and what it shows."""

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


def place(folder: Path, name: str, source: str, caption: str | None = None, **changes: Any) -> Path:
    """One of scikit-image's photographs with its caption; `size`, `quality` make it another file of the same look."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(PHOTOGRAPHS / f"{source}.png") as photograph:
        image = photograph.convert("RGB").resize(changes.pop("size", (256, 256)))
    image.save(folder / name, **changes)
    (folder / name).with_suffix(".txt").write_text(f"a photo of {source}" if caption is None else caption)
    return folder / name


def evaluate(folder: Path, instance: dg.DagsterInstance) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
    """Results of every check of the dataset and aspect_buckets assets, by dataset and name."""
    definitions = build_definitions(folder.parent)
    result = dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(
            *[
                key
                for asset in definitions.assets or []
                for key in getattr(asset, "keys", [])
                if key.path[-1] in ("dataset", "aspect_buckets")
            ]
        ),
        resources=dict(definitions.resources or {}),
        instance=instance,
    )
    assert result.success, "warnings stop nothing"
    return {
        ("/".join(check.asset_key.path[1:]), check.check_name): check
        for check in result.get_asset_check_evaluations()
    }


def shown(check: dg.AssetCheckEvaluation) -> Image.Image:
    encoded = check.metadata["images"].value.split("base64,")[1].removesuffix(")")
    assert len(encoded) <= 400_000
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def holds(sheet: Image.Image, image: Path) -> int:
    """In how many places of a contact sheet with tiles of 160 pixels an image is shown."""
    tile = Image.open(image).convert("RGB").resize((16, 16))
    found = 0
    for top in range(8, sheet.height - 160, 208 - 8):
        for left in range(8, sheet.width - 160, 168):
            cut = sheet.crop((left, top, left + 160, top + 160)).convert("RGB").resize((16, 16))
            difference = sum(abs(a - b) for a, b in zip(cut.tobytes(), tile.tobytes(), strict=True))
            found += difference / 768 < 12
    return found


def test_a_sound_dataset_passes_and_says_what_it_holds(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.3})
    for name in IMAGES:
        place(folder / "data", f"{name}.png", name)
    (folder / "data" / "notes.md").write_text("notes")
    (folder / "data" / "raw.cr2").write_bytes(b"raw")
    (folder / "data" / "cut.png").write_bytes((folder / "data" / "moon.png").read_bytes()[:500])
    checks = evaluate(folder, instance)
    unheld = checks.pop(("shapes/aspect_buckets", "may_leak_into_eval"))
    assert (unheld.passed, unheld.severity) == (False, dg.AssetCheckSeverity.WARN), "0 of 0 is not a pass"
    assert str(unheld.description).startswith("There are no evaluation images to compare with the 6")
    assert [name for name, check in checks.items() if not check.passed] == []
    told = checks["shapes/dataset", "files_accounted_for"].description
    assert told.startswith("9 found = 6 kept + 3 dropped (")
    for reason in ("1 not an image", "1 truncated", "1 image format .cr2 is not supported"):
        assert reason in told
    assert checks["shapes/dataset", "may_look_alike"].description == (
        "0 files are copies of others; 0 images look alike, in 0 groups."
    )
    assert (
        "6 images = 6 planned + 0 filtered out"
        in checks["shapes/aspect_buckets", "images_accounted_for"].description
    )


def test_look_alikes_are_named_and_shown_side_by_side(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0})
    for name in IMAGES:
        place(folder / "data", f"{name}.png", name)
    place(folder / "data", "smaller.jpg", "coffee", size=(160, 160), quality=60)
    shutil.copy(folder / "data" / "moon.png", folder / "data" / "moon again.png")
    (folder / "data" / "moon again.txt").write_text("the moon again")
    place(folder / "data", "flat.png", "moon").unlink()
    Image.new("RGB", (256, 256), "red").save(folder / "data" / "flat.png")
    check = evaluate(folder, instance)["shapes/dataset", "may_look_alike"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "1 files are copies of others (moon again.png = moon.png)" in check.description
    assert "2 images look alike, in 1 groups (coffee.png ~ smaller.jpg)" in check.description
    assert "1 flat or evenly shaded ones cannot be compared" in check.description
    sheet = shown(check)
    assert (holds(sheet, folder / "data" / "coffee.png"), holds(sheet, folder / "data" / "moon.png")) == (
        2,
        2,
    )
    assert holds(sheet, folder / "data" / "chelsea.png") == 0


def test_look_alikes_that_were_not_searched_are_not_promised_to_be_absent(instance, make_project):
    folder = make_project(
        images=0, dataset={"find_near_duplicates": False}, config={"eval_holdout_share": 0.3}
    )
    for name in IMAGES:
        place(folder / "data", f"{name}.png", name)
    place(folder / "data", "smaller.jpg", "coffee", size=(160, 160))
    place(folder / "data", "smaller2.jpg", "coffee", size=(150, 150))
    checks = evaluate(folder, instance)
    assert checks["shapes/dataset", "may_look_alike"].passed
    assert "find_near_duplicates is off" in checks["shapes/dataset", "may_look_alike"].description
    assert (
        "8 were compared by their bytes alone"
        in checks["shapes/aspect_buckets", "may_leak_into_eval"].description
    )


def test_images_that_look_alike_are_held_out_together(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.5})
    for name in IMAGES:
        for number in range(3):
            place(folder / "data", f"{name}_{number}.png", name, size=(256 - 16 * number, 256 - 16 * number))
    check = evaluate(folder, instance)["shapes/aspect_buckets", "may_leak_into_eval"]
    assert check.passed
    count, total = map(int, re.match(r"(\d+) of (\d+) evaluation images", check.description).groups())
    assert count == 0
    assert 3 <= total <= 9
    assert total % 3 == 0


def test_a_group_of_look_alikes_that_had_to_be_split_is_reported_and_shown(instance, make_project):
    folder = make_project(images=0, config={"eval_holdout_share": 0.1})
    for number in range(9):
        place(folder / "data", f"{number}.png", "coffee", size=(256 - 8 * number, 256 - 8 * number))
    check = evaluate(folder, instance)["shapes/aspect_buckets", "may_leak_into_eval"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description.startswith("1 of 1 evaluation images are trained on")
    assert " ~ " in check.description
    assert shown(check).width < 400, "two in a row"
    record = json.loads((folder / "output" / "held_out" / "shapes.json").read_text())
    assert len(record["keys"]) == 1


def write_datasets(folder: Path, *entries: dict[str, Any]) -> None:
    defaults = {**DATASET, "caption_strategy": "textfile"}
    (folder / "multidatabackend.json").write_text(json.dumps([{**defaults, **entry} for entry in entries]))


def test_an_eval_dataset_is_compared_with_every_dataset_that_is_trained_on(
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
            place(folder / dataset, f"{name}.png", name)
    clean = evaluate(folder, instance)
    leaks = ["may_leak_from_people", "may_leak_from_things"]
    assert all(clean["unseen/dataset", name].passed for name in leaks)
    assert not [name for _, name in clean if name == "may_leak_into_eval"], (
        "nothing is held out beside an eval dataset"
    )

    versions = [version(instance, "small", "unseen", stage) for stage in ("dataset", "aspect_buckets")]
    place(folder / "things", "again.jpg", "coins", size=(200, 200))
    shutil.copy(folder / "unseen" / "moon.png", folder / "things" / "moon.png")
    (folder / "things" / "moon.txt").write_text("the moon")
    leaking = evaluate(folder, instance)
    assert leaking["unseen/dataset", "may_leak_from_people"].passed
    check = leaking["unseen/dataset", "may_leak_from_things"]
    assert not check.passed
    assert "2 of 2 evaluation images" in check.description
    assert "(coins.png ~ again.jpg, moon.png = moon.png)" in check.description
    assert holds(shown(check), folder / "unseen" / "coins.png") == 2
    assert versions == [
        version(instance, "small", "unseen", stage) for stage in ("dataset", "aspect_buckets")
    ]


def version(instance: dg.DagsterInstance, *path: str) -> str:
    event = instance.get_latest_materialization_event(dg.AssetKey(path))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization.tags["dagster/data_version"]


def scanned(captions: list[list[str]], statuses: list[str] | None = None) -> pd.DataFrame:
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


def results(frame: pd.DataFrame, **settings: Any) -> dict[str, dg.AssetCheckResult]:
    defaults = {"id": "x", "instance_data_dir": "/nowhere", "resolution": 64, "caption_strategy": "textfile"}
    dataset = ImageDataset.model_validate(defaults | settings)
    return {str(check.check_name): check for check in check_dataset(frame, dataset, Path("/nowhere"))}


def test_captions_shared_by_many_are_told_with_how_many():
    captions = (
        [["a dog", "a brown dog"]] * 6 + [["a cat"]] * 4 + [[f"number {n}"] for n in range(5)] + [[""]] * 9
    )
    check = results(scanned(captions))["may_share_captions"]
    assert not check.passed
    assert "2 of 8 captions" in str(check.description)
    assert "'a dog' (6)" in str(check.description)
    assert "'a brown dog' (6)" in str(check.description)
    assert "a cat" not in str(check.description)
    assert results(scanned([["a cat"]] * 4))["may_share_captions"].passed
    copies = scanned([["a dog"]] * 9)
    copies["key"] = "the same image"
    assert results(copies)["may_share_captions"].passed


def test_an_instance_prompt_is_meant_to_be_shared():
    for settings in ({"caption_strategy": "instanceprompt"}, {"only_instance_prompt": True}):
        check = results(scanned([["a zorp"]] * 20), instance_prompt="a zorp", **settings)[
            "may_share_captions"
        ]
        assert check.passed
        assert "as the settings say" in str(check.description)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda frame: frame.assign(status=["dropped", *frame["status"][1:]]), "1 without a reason!"),
        (lambda frame: frame.assign(path=["1.png", *frame["path"][1:]]), "1 listed twice!"),
        (lambda frame: frame.assign(key=["", *frame["key"][1:]]), "1 kept although never read!"),
        (lambda frame: frame.assign(status=["lost", *frame["status"][1:]]), "3 found = 2 kept + 0 dropped"),
    ],
)
def test_a_file_that_is_not_accounted_for_blocks(change, told):
    check = results(change(scanned([["a"], ["b"], ["c"]])))["files_accounted_for"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert told in str(check.description)


def test_missing_captions_block_beyond_a_limit_unless_they_are_meant():
    few = scanned([["a"]] * 9 + [[]], ["ok"] * 9 + ["missing"])
    many = scanned([["a"]] * 5 + [[]] * 5, ["ok"] * 5 + ["missing"] * 5)
    assert results(few)["captions_present"].passed
    check = results(many)["captions_present"]
    assert not check.passed
    assert "5 of 10 images (50%)" in str(check.description)
    assert results(many, missing_captions="empty")["captions_present"].passed


def test_short_buckets_are_told_with_their_images():
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
    assert checks["images_accounted_for"].passed
    assert "4 planned + 1 filtered out (1 too small)" in str(checks["images_accounted_for"].description)
    assert not checks["may_fill_a_batch"].passed
    assert str(checks["may_fill_a_batch"].description).startswith(
        "Buckets with fewer images than a batch of 2: 128x64 (1). An optimizer step"
    )


def test_what_is_not_used_and_what_is_trained_both_ways_is_reported(
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
        place(folder / "people" / "4_people", f"{name}.png", name)
    for name in IMAGES[3:]:
        place(folder / "prior", f"{name}.png", name)
    assert evaluate(folder, instance)["prior/dataset", "may_repeat_people"].passed
    shutil.copy(folder / "people" / "4_people" / "camera.png", folder / "prior" / "same.png")
    (folder / "prior" / "same.txt").write_text("the same")
    checks = evaluate(folder, instance)
    check = checks["prior/dataset", "may_repeat_people"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == (
        "1 of 4 regularisation images are also ordinary training images of people (same.png = 4_people/camera.png). "
        "Remove them from one of the two."
    )
    assert checks["prior/dataset", "may_leave_data_unused"].passed
    check = checks["people/dataset", "may_leave_data_unused"]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    event = instance.get_latest_materialization_event(dg.AssetKey(["small", "people", "dataset"]))
    assert event is not None
    assert event.asset_materialization is not None
    listed = event.asset_materialization.metadata["not_used"].value
    for words in (
        '"people".crop_style has no effect: crop is false',
        "3 text files are stored beside images and not read; write caption_strategy: textfile.",
        'folder 4_people (3 images): the repeats in its name, as kohya\'s trainers write them, are ignored; write "repeats": 3',
    ):
        assert words in str(check.description)
        assert words in str(listed)
