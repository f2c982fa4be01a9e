"""Publishing a release: one commit and one tag, nothing for equal content, and no file of anybody else touched."""

import json
from pathlib import Path

import pytest

from sdxl_pipeline import hub_client
from sdxl_pipeline.release.upload import UploadError
from tests.release.hub_publishing import REPO, files_of, publish_to, write_release
from tests.support.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.adopt_process(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(hub_client, "first_wait_seconds", 0.01)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def test_publish_creates_a_private_repository_with_one_commit_and_one_tag(hub, folder):
    published = publish_to(hub, folder)
    repo = hub.repos[REPO]
    assert hub.files(REPO) == files_of(folder)
    assert repo.private
    assert hub.commits(REPO) == ["Initial commit", "zorp"]
    assert repo.tags == {published.tag: repo.head.oid}
    assert published.commit == repo.head.oid
    assert published.url == f"{hub.endpoint}/{REPO}/commit/{repo.head.oid}"
    assert published.changed


def test_publish_to_a_name_without_owner_uses_the_tokens_account(hub, folder):
    assert publish_to(hub, folder, "zorp").repo_id == f"{hub.user}/zorp"
    assert publish_to(hub, folder, "zorp").changed is False


def test_publish_keeps_the_visibility_of_an_existing_repository(hub, folder):
    hub.add_repo(REPO, private=False)
    publish_to(hub, folder)
    assert not hub.repos[REPO].private


def test_publish_of_equal_content_makes_no_commit_and_returns_the_tagged_one(hub, folder):
    first = publish_to(hub, folder)
    hub.add_repo(REPO, folder)  # another commit, of the same files
    again = publish_to(hub, folder)
    assert (again.commit, again.tag, again.changed) == (first.commit, first.tag, False)
    assert len(hub.commits(REPO)) == 3
    assert hub.repos[REPO].tags == {first.tag: first.commit}


def test_publish_of_equal_content_restores_a_missing_tag(hub, folder):
    first = publish_to(hub, folder)
    hub.repos[REPO].tags.clear()
    assert publish_to(hub, folder).commit == first.commit
    assert hub.repos[REPO].tags == {first.tag: first.commit}
    assert len(hub.commits(REPO)) == 2


def test_publish_of_changed_content_uploads_only_what_changed(hub, folder):
    first = publish_to(hub, folder)
    (folder / "README.md").write_text("# Better\n")
    uploads = [request for request in hub.requests if request.method == "PUT"]
    second = publish_to(hub, folder)
    assert [request for request in hub.requests if request.method == "PUT"] == uploads
    assert hub.repos[REPO].tags == {first.tag: first.commit, second.tag: second.commit}
    assert hub.files(REPO, first.tag)["README.md"] != hub.files(REPO, second.tag)["README.md"]


def test_publish_deletes_only_files_of_the_earlier_release(hub, tmp_path):
    publish_to(hub, write_release(tmp_path / "first", old__json=b"{}", images__old=b"x"))
    foreign = {"checkpoints/run/a.bin": b"c", ".gitattributes": b"*", "notes.txt": b"mine", "old/a": b"x"}
    upload_commit(hub, {**hub.files(REPO), **foreign})
    second = write_release(tmp_path / "second")
    publish_to(hub, second)
    assert hub.files(REPO) == files_of(second) | foreign


def test_publish_ignores_protected_and_absent_names_in_the_published_list(hub, tmp_path):
    listed = ["checkpoints/run/a.bin", ".gitattributes", "absent.txt", "../up", 3, "old.txt"]
    kept = {"checkpoints/run/a.bin": b"c", ".gitattributes": b"*"}
    hub.add_repo(REPO)
    upload_commit(hub, {**kept, "old.txt": b"x", "lineage.json": json.dumps({"files": listed}).encode()})
    folder = write_release(tmp_path / "release")
    publish_to(hub, folder)
    assert hub.files(REPO) == files_of(folder) | kept


@pytest.mark.parametrize("lineage", [b"no JSON", b"[]", b'{"weights_sha256": "0"}'])
def test_publish_over_a_release_without_a_list_deletes_nothing(hub, folder, lineage):
    hub.add_repo(REPO)
    upload_commit(hub, {"lineage.json": lineage, "old.txt": b"x"})
    publish_to(hub, folder)
    assert hub.files(REPO) == files_of(folder) | {"old.txt": b"x"}


def test_publish_of_an_earlier_content_again_commits_and_keeps_its_tag(hub, tmp_path):
    old, new = write_release(tmp_path / "old"), write_release(tmp_path / "new", weights=b"new")
    first, _, third = publish_to(hub, old), publish_to(hub, new), publish_to(hub, old)
    assert third.changed
    assert third.tag == first.tag
    assert hub.files(REPO) == hub.files(REPO, first.tag) == files_of(old)


def test_publish_with_the_tag_on_other_content_fails_after_the_commit(hub, folder):
    published = publish_to(hub, folder)
    repo = hub.repos[REPO]
    repo.tags[published.tag] = repo.commits[0].oid
    with pytest.raises(
        UploadError, match=r"whose files are not those of this release. Delete the tag"
    ) as raised:
        publish_to(hub, folder)
    assert "published as commit" in str(raised.value)
    assert len(hub.commits(REPO)) == 2


def test_publish_overtaken_by_a_checkpoint_upload_keeps_both(hub, folder, monkeypatch):
    """The other commit arrives between the listing of the head and our commit."""
    hub.add_repo(REPO)
    overtake(hub, monkeypatch, {"checkpoints/run/a.bin": b"c"})
    published = publish_to(hub, folder)
    assert hub.files(REPO) == files_of(folder) | {"checkpoints/run/a.bin": b"c"}
    assert hub.commits(REPO).count("zorp") == 1
    assert hub.repos[REPO].tags == {published.tag: hub.repos[REPO].head.oid}


def upload_commit(hub: HubServer, files: dict[str, bytes]) -> None:
    from tests.support.hub_server import Blob

    hub.repos[REPO].commit("Another", {name: Blob(data, lfs=False) for name, data in files.items()})


def overtake(hub: HubServer, monkeypatch, files: dict[str, bytes]) -> None:
    from huggingface_hub import HfApi

    original = HfApi.preupload_lfs_files
    commits = [files]

    def preupload(self, *args, **options):
        original(self, *args, **options)
        while commits:
            upload_commit(hub, commits.pop())

    monkeypatch.setattr(HfApi, "preupload_lfs_files", preupload)
