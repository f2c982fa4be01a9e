"""The local Hub matches the real client's expectations: downloads resume, invalid tokens are rejected, commits are atomic."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.adopt_process(monkeypatch, tmp_path / "hf_home")
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "unet").mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (root / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 4096)
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return root


def contents(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found if ".cache" not in p.parts}


def test_snapshot_download_equals_the_folder_and_is_cached(hub: HubServer, folder: Path) -> None:
    commit = hub.add_repo("someone/model", folder)
    path = Path(snapshot_download("someone/model", endpoint=hub.endpoint))
    assert path.name == commit
    assert contents(path) == contents(folder)
    before = len(hub.requests)
    snapshot_download("someone/model", revision=commit, endpoint=hub.endpoint)
    assert len(hub.requests) == before, "a snapshot of a known commit needs no network"


def test_snapshot_download_applies_allow_patterns(hub: HubServer, folder: Path) -> None:
    hub.add_repo("someone/model", folder)
    path = Path(snapshot_download("someone/model", endpoint=hub.endpoint, allow_patterns=["*.json"]))
    assert set(contents(path)) == {"model_index.json"}


def test_download_of_an_older_commit(hub: HubServer, folder: Path) -> None:
    first = hub.add_repo("someone/model", folder)
    (folder / "model_index.json").write_text("{}")
    second = hub.add_repo("someone/model", folder)
    assert first != second
    for revision, text in (
        (first, '{"_class_name": "StableDiffusionXLPipeline"}'),
        (second, "{}"),
        ("main", "{}"),
    ):
        path = hf_hub_download("someone/model", "model_index.json", revision=revision, endpoint=hub.endpoint)
        assert Path(path).read_text() == text


def test_interrupted_download_resumes(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client writes complete chunks only, of 10 MB by default.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65_536)
    hub.add_repo("someone/model", folder)
    hub.cut_next(after_bytes=300_000)
    path = hf_hub_download("someone/model", "unet/weights.safetensors", endpoint=hub.endpoint)
    assert Path(path).read_bytes() == (folder / "unet" / "weights.safetensors").read_bytes()
    ranges = [r.range for r in hub.requests if r.path.startswith("/lfs/") and r.range]
    assert ranges == [f"bytes={4 * 65_536}-"]


def test_download_of_absent_repository_revision_or_file_raises(hub: HubServer, folder: Path) -> None:
    hub.add_repo("someone/model", folder)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("someone/other", endpoint=hub.endpoint)
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("someone/model", revision="v9", endpoint=hub.endpoint)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("someone/model", "absent.json", endpoint=hub.endpoint)


def test_private_repository_requires_a_token(hub: HubServer, folder: Path) -> None:
    hub.add_repo("someone/secret", folder, private=True)
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("someone/secret", endpoint=hub.endpoint, token=False)
    path = snapshot_download("someone/secret", endpoint=hub.endpoint, token=hub.read_token)
    assert contents(Path(path)) == contents(folder)


def test_invalid_absent_or_read_only_tokens_raise(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HfApi(endpoint=hub.endpoint, token=hub.token).whoami()["name"] == hub.user
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as raised:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    assert raised.value.response.status_code == 401
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(LocalTokenNotFoundError):
        HfApi(endpoint=hub.endpoint).whoami()
    with pytest.raises(HfHubHTTPError, match="write token"):
        HfApi(endpoint=hub.endpoint, token=hub.read_token).create_repo("someone/new")
    with pytest.raises(HfHubHTTPError, match="namespace"):
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("stranger/new")
    assert hub.repos == {}


def test_upload_folder_round_trip_and_unchanged_files(hub: HubServer, folder: Path) -> None:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    url = api.create_repo("someone/published", private=True, exist_ok=True)
    assert url.repo_id == "someone/published"
    api.create_repo("someone/published", private=True, exist_ok=True)
    commit = api.upload_folder(repo_id="someone/published", folder_path=folder, commit_message="Release 1")
    assert hub.files("someone/published") == contents(folder)
    assert hub.repos["someone/published"].private
    assert hub.commits("someone/published") == ["Initial commit", "Release 1"]
    assert commit.oid == hub.repos["someone/published"].head.oid

    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    api.upload_folder(
        repo_id="someone/published", folder_path=folder, delete_patterns="*", commit_message="Release 2"
    )
    assert hub.files("someone/published") == contents(folder)
    uploads = [r for r in hub.requests if r.method == "PUT"]
    assert len(uploads) == 1, "unchanged weights are not uploaded again"

    again = api.upload_folder(repo_id="someone/published", folder_path=folder, commit_message="Release 3")
    assert hub.commits("someone/published")[-1] == "Release 2", "nothing changed, so nothing is committed"
    assert again.oid == hub.repos["someone/published"].head.oid


def test_upload_of_invalid_model_card_metadata_raises(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("someone/published")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_folder(repo_id="someone/published", folder_path=folder)
    assert hub.files("someone/published") == {}


def test_fail_next_fails_the_given_number_of_requests(hub: HubServer, folder: Path) -> None:
    hub.add_repo("someone/model", folder)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    hub.fail_next(2, status=503, path="/api/models/")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Injected fault"):
            api.model_info("someone/model")
    assert api.model_info("someone/model").sha == hub.repos["someone/model"].head.oid


def test_environment_directs_another_process_to_the_server(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    hub.add_repo("someone/model", folder)
    program = (
        "import huggingface_hub as h; print(h.snapshot_download('someone/model'));"
        "h.create_repo('someone/out'); h.upload_file(path_or_fileobj=b'hi', path_in_repo='a.txt', repo_id='someone/out')"
    )
    environment = os.environ | hub.environment(tmp_path / "other_home")
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == contents(folder)
    assert hub.files("someone/out") == {"a.txt": b"hi"}


def test_dataset_repositories_are_separate_and_may_be_gated(hub: HubServer, folder: Path) -> None:
    hub.add_repo("someone/cats", folder)
    (folder / "README.md").write_text("# Cats\n")
    commit = hub.add_dataset("someone/cats", folder)
    path = Path(snapshot_download("someone/cats", repo_type="dataset", endpoint=hub.endpoint))
    assert (path.name, contents(path)) == (commit, contents(folder))
    hub.add_dataset("someone/gated", folder, gated=True)
    with pytest.raises(GatedRepoError):
        HfApi(endpoint=hub.endpoint).dataset_info("someone/gated")
