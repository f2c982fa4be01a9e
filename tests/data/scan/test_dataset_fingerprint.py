"""Holds: the state of a dataset is seen from this machine alone, holds no secret, and changes with what the dataset is read from."""

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
def test_what_lies_elsewhere_is_not_asked_nor_digested_with_its_keys(no_network, settings):
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b"}
    assert dataset_fingerprint(dataset(**settings)) == dataset_fingerprint(dataset(**settings, **keys))


def test_a_changed_list_is_seen(tmp_path: Path):
    path = tmp_path / "list.csv"
    states = [dataset_fingerprint(dataset(type="csv", csv_file=path))]
    for text in ("url\na", "url\nab"):
        path.write_text(text)
        states.append(dataset_fingerprint(dataset(type="csv", csv_file=path)))
    assert len(set(states)) == 3


def test_a_folder_changes_with_its_files_and_with_what_stands_beside(tmp_path: Path):
    folder = tmp_path / "data"
    assert folder_fingerprint(folder) == "absent"
    folder.mkdir()
    local = dataset(instance_data_dir=folder, caption_filter_list=tmp_path / "filter.txt")
    states = [dataset_fingerprint(local)]
    (folder / "a.png").write_bytes(b"a")
    states.append(dataset_fingerprint(local))
    (folder / "a.png").rename(folder / "b.png")
    states.append(dataset_fingerprint(local))
    (tmp_path / "filter.txt").write_text("a photo of")
    states.append(dataset_fingerprint(local))
    assert len(set(states)) == 4
    assert dataset_fingerprint(local) == states[-1]


def test_only_a_pinned_commit_stays_as_it_is(make_project):
    def elsewhere(name: str, **settings) -> bool:
        return has_remote_datasets(
            load_project(make_project(name, dataset={"instance_data_dir": "", **settings}))
        )

    hub = {"type": "huggingface", "dataset_name": "someone/cats"}
    assert elsewhere("branch", **hub, revision="main")
    assert elsewhere("bucket", type="aws", url="s3://bucket/cats")
    assert not elsewhere("pinned", **hub, revision="0" * 40)
    assert not elsewhere("local", instance_data_dir="data")
