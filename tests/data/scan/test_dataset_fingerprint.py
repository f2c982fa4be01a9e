"""Tests of dataset fingerprints: they use local files only, contain no secret, and change with every input."""

import socket
from pathlib import Path

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.scan.dataset_fingerprint import (
    dataset_fingerprint,
    folder_fingerprint,
    has_remote_datasets,
)

REMOTE = [
    {"type": "huggingface", "dataset_name": "someone/cats"},
    {"type": "aws", "url": "s3://bucket/cats"},
    {"type": "csv", "csv_file": "list.csv"},
]


def dataset(**settings) -> ImageDataset:
    return ImageDataset.model_validate({"id": "cats", "resolution": 64, **settings})


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("settings", REMOTE)
def test_dataset_fingerprint_remote_dataset_uses_neither_network_nor_secrets(no_network, settings):
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    assert dataset_fingerprint(dataset(**settings)) == dataset_fingerprint(dataset(**settings, **keys))


def test_dataset_fingerprint_changes_with_list(tmp_path: Path):
    path = tmp_path / "list.csv"
    fingerprints = [dataset_fingerprint(dataset(type="csv", csv_file=path))]
    for text in ("url\na", "url\nab"):
        path.write_text(text)
        fingerprints.append(dataset_fingerprint(dataset(type="csv", csv_file=path)))
    assert len(set(fingerprints)) == 3


def test_dataset_fingerprint_changes_with_files_and_filter_list(tmp_path: Path):
    folder = tmp_path / "data"
    assert folder_fingerprint(folder) == "absent"
    folder.mkdir()
    local = dataset(instance_data_dir=folder, caption_filter_list=tmp_path / "filter.txt")
    fingerprints = [dataset_fingerprint(local)]
    (folder / "a.png").write_bytes(b"a")
    fingerprints.append(dataset_fingerprint(local))
    (folder / "a.png").rename(folder / "b.png")
    fingerprints.append(dataset_fingerprint(local))
    (tmp_path / "filter.txt").write_text("a photo of")
    fingerprints.append(dataset_fingerprint(local))
    assert len(set(fingerprints)) == 4
    assert dataset_fingerprint(local) == fingerprints[-1]


def test_has_remote_datasets_pinned_commit_is_not_remote(make_project):
    def is_remote(name: str, **settings) -> bool:
        return has_remote_datasets(
            load_project(make_project(name, dataset={"instance_data_dir": "", **settings}))
        )

    hub = {"type": "huggingface", "dataset_name": "someone/cats"}
    assert is_remote("branch", **hub, revision="main")
    assert is_remote("bucket", type="aws", url="s3://bucket/cats")
    assert not is_remote("pinned", **hub, revision="0" * 40)
    assert not is_remote("local", instance_data_dir="data")
