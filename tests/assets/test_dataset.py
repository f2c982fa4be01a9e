"""The dataset asset: downloads, reads, metadata, and staleness."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from resources.storage import read_parquet
from sdxl_pipeline.definitions import build_definitions
from tests.conftest import draw_image

LONG_AGO = 1_600_000_000


class Dataset:
    """The dataset asset of one project, for repeated materializations."""

    def __init__(self, instance: dg.DagsterInstance, folder: Path, storage: Path) -> None:
        self.instance, self.folder, self.storage = instance, folder, storage
        self.data = folder / "data"

    def backdate(self) -> None:
        """Set old modification times: recorded digests of recently written files are not trusted."""
        for path in self.data.iterdir():
            os.utime(path, (LONG_AGO, LONG_AGO))

    def configure(self, **settings: Any) -> None:
        file = self.folder / "multidatabackend.json"
        entries = json.loads(file.read_text())
        file.write_text(json.dumps([entries[0] | settings, *entries[1:]]))

    def load(self) -> tuple[dg.AssetsDefinition, Mapping[str, Any]]:
        definitions = build_definitions(self.folder.parent)
        assets = (asset for asset in definitions.assets or [] if isinstance(asset, dg.AssetsDefinition))
        return next(
            asset for asset in assets if asset.key.path[-1] == "shapes_dataset"
        ), definitions.resources or {}

    def run(self, **config: Any) -> tuple[dict[str, Any], pd.DataFrame]:
        """Return the metadata, with the data version as `version`, and the value."""
        asset, resources = self.load()
        result = dg.materialize(
            [asset],
            resources=resources,
            instance=self.instance,
            run_config={"ops": {asset.node_def.name: {"config": config}}} if config else None,
        )
        event = result.asset_materializations_for_node(asset.node_def.name)[0]
        metadata = {name: entry.value for name, entry in event.metadata.items()}
        tags = event.tags or {}
        return metadata | {"version": tags["dagster/data_version"]}, read_parquet(Path(str(metadata["path"])))

    def code_version(self) -> str:
        asset, _ = self.load()
        return str(asset.code_versions_by_key[asset.key])


@pytest.fixture
def dataset(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], isolated_storage: Path
) -> Dataset:
    dataset = Dataset(
        instance, make_project(images=4, dataset={"find_near_duplicates": False}), isolated_storage
    )
    dataset.backdate()
    return dataset


def test_dataset_second_run_trusts_the_recorded_scan_unless_verify(dataset: Dataset) -> None:
    first, before = dataset.run()
    assert (first["found"], first["kept"], first["captions"]) == (4, 4, 4)
    assert (dataset.storage / "work" / "small" / "shapes" / "dataset" / "scan.parquet").exists()
    caption = dataset.data / "image_00.txt"
    caption.write_text(caption.read_text().upper())  # size, inode and time stay as they were
    dataset.backdate()
    second, trusted = dataset.run()
    assert second["version"] == first["version"]
    pd.testing.assert_frame_equal(trusted, before)
    verified, read = dataset.run(verify=True)
    assert verified["version"] != first["version"]
    assert read["captions"].tolist()[0] == [caption.read_text()]
    caption.write_text(caption.read_text().lower())
    dataset.backdate()
    dataset.configure(verify=True)
    assert dataset.run()[0]["version"] == first["version"]


def test_dataset_skip_file_discovery_uses_the_recorded_scan(dataset: Dataset) -> None:
    dataset.configure(skip_file_discovery="vae,aspect")
    first, before = dataset.run()
    assert "discovery" not in first  # no scan was recorded yet
    draw_image(dataset.data, 9)
    second, same = dataset.run()
    assert second["discovery"].startswith("skipped")
    pd.testing.assert_frame_equal(same, before)
    assert len(dataset.run(verify=True)[1]) == 5


def test_dataset_caption_settings_change_the_code_version(dataset: Dataset) -> None:
    versions = [dataset.code_version()]
    filters = dataset.folder / "filters.txt"
    filters.write_text("a large\n")
    entries = [{"id": "texts", "dataset_type": "text_embeds", "caption_filter_list": "filters.txt"}]
    file = dataset.folder / "multidatabackend.json"
    file.write_text(json.dumps(json.loads(file.read_text()) + entries))
    versions.append(dataset.code_version())
    filters.write_text("a small\n")
    versions.append(dataset.code_version())
    for change in (
        {"caption_filter_list": ["red"]},
        {"caption_shuffle": {"enable": True, "split_on": "space"}},
        {"max_num_samples": 3},
        {"disable_multiline_split": True},
        {"find_near_duplicates": True},
    ):
        dataset.configure(**change)
        versions.append(dataset.code_version())
    assert len(set(versions)) == len(versions)
    dataset.configure(verify=True, skip_file_discovery="vae", repeats=3)
    assert dataset.code_version() == versions[-1]


def test_dataset_filters_shuffles_and_samples_apply_to_the_value(dataset: Dataset) -> None:
    dataset.configure(
        caption_filter_list=["a ", "(on", "s/background/wall/"],
        caption_shuffle={"enable": True, "count": 1},
        max_num_samples=2,
    )
    shown, scanned = dataset.run()
    assert (shown["kept"], shown["captions"], shown["caption_filter_lines"]) == (2, 4, 3)
    assert "`(on`" in shown["literal_filter_lines"]
    for texts in scanned.loc[scanned["status"] == "kept", "captions"]:
        words = [sorted(text.split(", ")) for text in texts]
        assert words == [words[0]] * 2
        assert "wall, number" in texts[0]
    assert set(scanned.loc[scanned["status"] == "dropped", "reason"]) == {"left out by max_num_samples"}


def test_dataset_images_trained_without_caption_are_listed(dataset: Dataset) -> None:
    (dataset.data / "image_01.txt").unlink()
    dataset.configure(missing_captions="empty")
    shown, _ = dataset.run()
    rows = shown["trained_without_caption"]
    assert [(row.data["reason"], row.data["names"]) for row in rows.records] == [
        ("caption missing", "image_01.png")
    ]


def test_dataset_url_list_is_downloaded_and_failures_are_rows(dataset: Dataset) -> None:
    listed = dataset.folder / "list.csv"
    names = [f"image_{number:02d}.png" for number in range(4)]
    rows = [f"{dataset.data / name},caption of {name}" for name in names] + [
        f"{dataset.data / 'gone.png'},gone"
    ]
    listed.write_text("\n".join(["url,caption", *rows]))
    dataset.configure(type="csv", csv_file="list.csv", instance_data_dir=None, caption_strategy="csv")
    shown, scanned = dataset.run()
    assert (shown["files_at_source"], shown["kept"], shown["failed_downloads"]) == (5, 4, 1)
    assert shown["revision"]
    kept = scanned[scanned["status"] == "kept"]
    assert sorted(text for texts in kept["captions"] for text in texts) == [
        f"caption of {name}" for name in names
    ]
    second, _ = dataset.run()
    assert second["version"] == shown["version"]
    listed.write_text(listed.read_text() + "\n,nobody\n")
    assert "1 row of list.csv without a value in column 'url', at line 7" in dataset.run()[0]["unused_data"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_filter_list": "gone.txt"}, "caption_filter_list .*gone.txt' cannot be read"),
        ({"caption_strategy": "parquet", "parquet": {"path": "gone.parquet"}}, "gone.parquet does not exist"),
        (
            {"type": "csv", "csv_file": "gone.csv", "instance_data_dir": None, "caption_strategy": "csv"},
            "gone.csv",
        ),
        ({"instance_data_dir": "gone"}, "does not exist. Create the folder"),
        (
            {"caption_strategy": "parquet", "parquet": {"path": "broken.jsonl"}},
            "row 1: column 'caption' has objects",
        ),
    ],
)
def test_dataset_user_error_fails_with_its_message_and_without_retries(
    dataset: Dataset, settings: dict[str, Any], message: str
) -> None:
    (dataset.data / "broken.jsonl").write_text('{"filename": "image_00", "caption": {"short": "a"}}')
    dataset.configure(**settings)
    with pytest.raises(dg.Failure, match=message) as raised:
        dataset.run()
    assert raised.value.allow_retries is False
