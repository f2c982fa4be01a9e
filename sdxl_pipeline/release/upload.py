"""Publishing a release folder: one commit and one tag, exactly once, whatever happens to the connection.

Every attempt first reads the repository's head and compares content by digest, so a commit whose answer was lost is found and not repeated,
equal content makes no commit, and `parent_commit` rejects a commit that another upload has overtaken.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.hub_client import (
    HubRefusalError,
    create_repository,
    describe_hub_error,
    has_secrets,
    is_lasting,
    is_rejection,
    next_step,
    retry_while_busy,
)
from sdxl_pipeline.release.release_inputs import LINEAGE_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)

CONFLICTS: Final = (409, 412)
"""Statuses of a change that another upload has overtaken: the next attempt starts from the new head."""
KEPT: Final = ("checkpoints/", ".gitattributes")
"""Beginnings of paths that belong to the repository and not to a release."""


UNPUBLISHED: Final = "Nothing was published."
IN_FLIGHT: Final = "Whether the Hub has the commit is unknown."
RETRY_ADVICE: Final = "The release stays on disk; materialize hub_release again to publish it: what is already published is not uploaded twice."


@dataclass(frozen=True)
class Published:
    """A release on the Hub."""

    repo_id: str
    commit: str
    url: str
    tag: str
    changed: bool
    """Whether this call made the commit; False when the repository already had the same files."""


class UploadError(Exception):
    """A release that could not be published; the message describes why and what to do next."""

    def __init__(self, message: str, is_lasting: bool) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting
        """Whether trying again without a change fails again."""


def publish(
    api: "HfApi",
    folder: Path,
    repo_id: str,
    private: bool,
    message: str,
    report: Callable[[str], object] = logger.warning,
) -> Published:
    """Publish the content of a release folder and return where it is.

    The repository is created if it does not exist; an existing one keeps its visibility. Files of an earlier release that this one lacks are
    deleted, by the list in the published lineage.json; other files stay. The tag's name is a digest of the content. Raises UploadError; the
    files in `folder` are never changed.
    """
    upload = _Upload(api, folder, repo_id, message)
    retry = partial(retry_while_busy, report=report, also=CONFLICTS)
    try:
        upload.repo_id = create_repository(api, repo_id, private, report, CONFLICTS)
        commit = retry(upload.commit, f"Uploading to {repo_id}")
        tagged = retry(partial(upload.ensure_tag, commit), f"Tagging {repo_id}")
    except (
        Exception
    ) as error:  # besides its own errors the client raises those of its HTTP library and of its threads
        if upload.state == IN_FLIGHT and is_rejection(error):
            upload.state = UNPUBLISHED
        reason = f"{folder} could not be published as {repo_id}: {describe_hub_error(error)}"
        raise UploadError(
            " ".join(filter(None, (f"{reason}.", next_step(error), upload.state, RETRY_ADVICE))),
            is_lasting=upload.state == UNPUBLISHED and is_lasting(error),
        ) from (None if has_secrets(error) else error)
    oid = commit if upload.sent else tagged
    url = f"{api.endpoint}/{upload.repo_id}/commit/{oid}"
    return Published(upload.repo_id, oid, url, upload.tag, changed=upload.sent)


class _Upload:
    """One release on its way to the Hub; each method may be called again after it failed."""

    def __init__(self, api: "HfApi", folder: Path, repo_id: str, message: str) -> None:
        self.repo_id, self.sent, self.state = repo_id, False, UNPUBLISHED
        self._api, self._message = api, message
        self._files = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        self._digests = {name: sha256_file(path) for name, path in self._files.items()}
        self.tag = f"r-{digest_json(self._digests)[:12]}"

    def commit(self) -> str:
        """Commit what differs from the head, and return the commit; the head itself if nothing differs."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._head("main")
        remote = self._remote_files(head)
        changed = self._different(remote)
        deleted = sorted((self._earlier_files(head, remote) & remote.keys()) - self._files.keys())
        if changed or deleted:
            additions = [CommitOperationAdd(name, self._files[name]) for name in changed]
            if additions:
                self._api.preupload_lfs_files(self.repo_id, additions)
            self.sent, self.state = True, IN_FLIGHT
            operations = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in deleted)]
            head = self._api.create_commit(
                self.repo_id, operations, commit_message=self._message, parent_commit=head
            ).oid
        self.state = f"The files are published as commit {head[:12]}, without the tag {self.tag}."
        return head

    def ensure_tag(self, commit: str) -> str:
        """Create the tag on a commit unless it exists, and return the commit that has it."""
        tagged = self._tagged()
        if tagged is None:
            self._api.create_tag(self.repo_id, tag=self.tag, revision=commit)
            return commit
        if tagged != commit and self._different(self._remote_files(tagged)):
            raise HubRefusalError(
                f"the tag {self.tag} is on commit {tagged[:12]}, whose files are not those of this release. Delete the tag on the Hub"
            )
        return tagged

    def _tagged(self) -> str | None:
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self._head(self.tag)
        except RevisionNotFoundError:
            return None

    def _head(self, revision: str) -> str:
        return str(self._api.model_info(self.repo_id, revision=revision).sha)

    def _remote_files(self, commit: str) -> dict[str, "RepoFile"]:
        from huggingface_hub.hf_api import RepoFile

        entries = self._api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _different(self, remote: Mapping[str, "RepoFile"]) -> list[str]:
        """Return the release's files whose content is not in the repository."""
        return [name for name in self._files if name not in remote or not self._is_same(name, remote[name])]

    def _is_same(self, name: str, remote: "RepoFile") -> bool:
        path = self._files[name]
        if remote.size != path.stat().st_size:
            return False
        return remote.lfs.sha256 == self._digests[name] if remote.lfs else remote.blob_id == _git_oid(path)

    def _earlier_files(self, commit: str, remote: Mapping[str, "RepoFile"]) -> set[str]:
        """Return the files of the release that a commit holds, by its lineage.json; empty without such a list."""
        if LINEAGE_FILE not in remote:
            return set()
        with TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(self.repo_id, LINEAGE_FILE, revision=commit, local_dir=folder)
            try:
                lineage = json.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError:  # not written by this project
                return set()
        names = lineage.get("files", []) if isinstance(lineage, dict) else []
        return {name for name in names if isinstance(name, str) and not name.startswith(KEPT)}


def _git_oid(path: Path) -> str:
    """Return git's object id of a file that is not in large-file storage."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
