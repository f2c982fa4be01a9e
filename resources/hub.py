"""Publishing releases to the Hugging Face Hub."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from sdxl_pipeline.hub_client import TOKEN_ADVICE, describe_hub_error, has_secrets, retry_while_busy
from sdxl_pipeline.release.card_validation import validate_card
from sdxl_pipeline.release.release_inputs import ReleaseError
from sdxl_pipeline.release.upload import Published, UploadError, publish

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WRITING_ROLES = {"write", "admin", "contributor"}


class HubResource(dg.ConfigurableResource):
    """Publishes releases. The Hub client reads the token itself (HF_TOKEN or `hf auth login`), so it is not a field here."""

    endpoint: str | None = Field(
        default=None,
        description="URL of a Hub other than https://huggingface.co; not set: the environment variable HF_ENDPOINT.",
    )

    def check_can_push(self, repo_id: str) -> None:
        """Check before training whether this token may publish to `repo_id` ("name" or "owner/name").

        The requests are `whoami` and, if that is forbidden, the repository's access check; there is none without a token. Raise
        `dagster.Failure` with the fix if it may not.
        """
        from huggingface_hub import get_token

        if get_token() is None:
            raise dg.Failure(
                f"push_to_hub is true, but there is no token for publishing {repo_id}. {TOKEN_ADVICE}",
                allow_retries=False,
            )
        api = self._api()
        try:
            account = retry_while_busy(api.whoami, "Requesting the token's owner from the Hub", _warn)
        except Exception as error:
            # The client also raises errors of its HTTP library, which have no common base class with its own.
            if _status(error) == 403:
                self._check_write_access(api, repo_id)
                return
            raise _permission_failure(error, repo_id, api.endpoint) from _loggable(error)
        problem = missing_write_access(account, repo_id)
        if problem:
            raise dg.Failure(f"{problem} {TOKEN_ADVICE}", allow_retries=False)

    def _check_write_access(self, api: "HfApi", repo_id: str) -> None:
        """Ask about the repository itself, for a usable token that may not ask who it is."""
        try:
            retry_while_busy(
                partial(api.auth_check, repo_id, write=True), f"Checking access to {repo_id}", _warn
            )
        except Exception as error:
            if _status(error) != 404:
                raise _permission_failure(error, repo_id, api.endpoint) from _loggable(error)
            _warn(
                f"The Hub does not report whether the token may create {repo_id}. If it may not, the release stays on disk after the training."
            )

    def qualified_id(self, repo_id: str) -> str:
        """Return "owner/name" of a repository; for "name" with the token's owner, or unchanged if the Hub does not report who that is."""
        if "/" in repo_id:
            return repo_id
        try:
            account = retry_while_busy(self._api().whoami, "Requesting the token's owner from the Hub", _warn)
        except Exception as error:
            # The client also raises errors of its HTTP library, which have no common base class with its own.
            _warn(
                f"The model card names no repository, since the owner of {repo_id} is unknown: {describe_hub_error(error)}. "
                "Write owner/name as hub_model_id."
            )
            return repo_id
        return f"{account['name']}/{repo_id}"

    def publish(self, folder: Path, repo_id: str, private: bool, commit_message: str) -> Published:
        """Publish a release folder as one commit and one tag; see `sdxl_pipeline.release.upload.publish`.

        Raise `dagster.Failure` when the Hub rejects the model card or the upload; the release stays on disk.
        """
        api = self._api()
        try:
            validate_card((folder / "README.md").read_text(encoding="utf-8"), api.endpoint, _warn)
            return publish(api, folder, repo_id, private, commit_message, _warn)
        except ReleaseError as error:
            raise dg.Failure(
                f"{folder} was not published: {error}, and materialize hub_release again.",
                allow_retries=False,
            ) from error
        except UploadError as error:
            raise dg.Failure(str(error), allow_retries=not error.is_lasting) from error

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a stage uses the same Hub."""
        return {} if self.endpoint is None else {"HF_ENDPOINT": self.endpoint}

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint or os.environ.get("HF_ENDPOINT"))


def _status(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _loggable(error: Exception) -> Exception | None:
    """Return an error as a cause that Dagster may log with its traceback; None if its message has a token."""
    return None if has_secrets(error) else error


def _permission_failure(error: Exception, repo_id: str, endpoint: str) -> dg.Failure:
    if _status(error) in (401, 403):
        return dg.Failure(
            f"the Hub rejects the token for publishing {repo_id}. {TOKEN_ADVICE}", allow_retries=False
        )
    return dg.Failure(
        f"push_to_hub is true, but the Hub at {endpoint} did not answer the permission check: {describe_hub_error(error)}. "
        "Materialize this asset again later."
    )


def _warn(message: str) -> None:
    dg.get_dagster_logger().warning(message)


def missing_write_access(account: dict[str, Any], repo_id: str) -> str | None:
    """Return why the account and token in the Hub's whoami response cannot write to a repository; None when they can.

    The Hub gives every token a role: "read", "write", or "fineGrained" with permissions per user, organization or repository.
    """
    user = account["name"]
    owner = repo_id.partition("/")[0] if "/" in repo_id else user
    organizations = {entry["name"]: entry.get("roleInOrg") for entry in account.get("orgs", [])}
    if owner != user:
        if owner not in organizations:
            return f"{repo_id} belongs to {owner}, but the token belongs to {user}, who is not a member of it; correct hub_model_id."
        role = organizations[owner]
        if role is not None and role not in WRITING_ROLES:
            return f"{user} may only {role} in the organization {owner} and cannot publish {repo_id}."
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return f"the token is read-only and cannot publish {repo_id}."
    if token.get("role") == "fineGrained":
        writable = {
            scope["entity"].get("name")
            for scope in token.get("fineGrained", {}).get("scoped", [])
            if "repo.write" in scope.get("permissions", [])
        }
        if not writable & {owner, f"{owner}/{repo_id.rpartition('/')[2]}"}:
            return f"the fine-grained token has no write permission for repositories of {owner} and cannot publish {repo_id}."
    return None
