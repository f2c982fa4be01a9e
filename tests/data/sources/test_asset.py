"""Tests of remote sources through the dataset asset: metadata of the download, and no secrets in storage, history or logs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from resources.storage import read_parquet
from sdxl_pipeline.definitions import build_definitions
from tests.conftest import DATASET
from tests.support.remote_sources import Bucket, image, tree


@pytest.fixture
def dataset(make_project: Callable[..., Path], tmp_path: Path):
    """Return a function that materializes the dataset asset of a project with one entry, and gives its metadata and value."""

    def run(instance: dg.DagsterInstance, **settings: Any) -> tuple[dict[str, Any], pd.DataFrame]:
        folder = tmp_path / "projects" / "remote"
        if not folder.exists():
            make_project("remote", images=0)
        local = {key: value for key, value in DATASET.items() if key != "instance_data_dir"}
        (folder / "multidatabackend.json").write_text(json.dumps([local | settings]))
        definitions = build_definitions(folder.parent)
        assets = [asset for asset in definitions.assets or [] if isinstance(asset, dg.AssetsDefinition)]
        asset = next(asset for asset in assets if asset.key.path[-1] == "shapes_dataset")
        result = dg.materialize([asset], resources=definitions.resources, instance=instance)
        (event,) = result.asset_materializations_for_node(asset.node_def.name)
        metadata = {name: entry.value for name, entry in event.metadata.items()}
        return metadata, read_parquet(Path(metadata["path"]))

    return run


def test_dataset_asset_hub_source_downloads_once(hub, dataset, instance: dg.DagsterInstance, tmp_path: Path):
    folder = tmp_path / "repository"
    (folder / "train").mkdir(parents=True)
    for index in range(3):
        (folder / "train" / f"{index}.png").write_bytes(image(index))
    rows = [{"file_name": f"{index}.png", "text": f"cat {index}"} for index in range(3)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    commit = hub.add_dataset("someone/cats", folder)
    entry = {"type": "huggingface", "dataset_name": "someone/cats", "caption_strategy": "huggingface"}
    metadata, scanned = dataset(instance, **entry)
    assert (metadata["revision"], metadata["downloaded"], metadata["kept"]) == (commit, 3, 3)
    assert sorted(map(tuple, scanned["captions"])) == [("cat 0",), ("cat 1",), ("cat 2",)]
    again, _ = dataset(instance, **entry)
    assert again["downloaded"] == 0


def test_dataset_asset_credentials_are_not_stored_or_logged(
    bucket: Bucket, dataset, isolated_storage: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    bucket.put("cats/0.png", image(0))
    bucket.put("cats/0.txt", b"a cat")
    bucket.put("cats/../1.png", image(1))
    entry = {
        "type": "aws",
        "aws_bucket_name": bucket.name,
        "aws_data_prefix": "cats",
        "aws_endpoint_url": bucket.endpoint,
        "aws_access_key_id": bucket.key_id,
        "aws_secret_access_key": bucket.secret,
    }
    history_folder = tmp_path / "history"
    history_folder.mkdir()
    with dg.instance_for_test(temp_dir=str(history_folder)) as instance:
        metadata, _ = dataset(instance, **entry)
        with pytest.raises(dg.Failure) as caught:
            dataset(instance, **entry | {"aws_bucket_name": "absent"})
    assert (metadata["downloaded"], metadata["kept"], metadata["failed_downloads"]) == (2, 1, 1)
    written = tree(isolated_storage) | tree(history_folder)
    assert any(name.endswith(".db") for name in written)
    output = "".join(capfd.readouterr())
    for secret in (bucket.secret, bucket.key_id):
        assert [name for name, data in written.items() if secret.encode() in data] == []
        assert secret not in f"{metadata} {caught.value} {caught.value.description}"
        assert secret not in output
