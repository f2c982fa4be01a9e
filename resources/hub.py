"""Publishing releases to the Hugging Face Hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from sdxl_pipeline.hub_client import describe_hub_error, retry_while_busy, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN_ADVICE = (
    "Set HF_TOKEN to a token with write permission (https://huggingface.co/settings/tokens), or run `hf auth login`; "
    "or set push_to_hub to false in config.json to write the release to disk only."
)
WRITING_ROLES = {"write", "admin", "contributor"}


class HubResource(dg.ConfigurableResource):
    """Publishes releases. The Hub client reads the token itself (HF_TOKEN or `hf auth login`), so it is not a field here."""

    endpoint: str | None = Field(
        default=None,
        description="URL of a Hub other than https://huggingface.co; not set: the environment variable HF_ENDPOINT.",
    )

    def check_can_push(self, repo_id: str) -> None:
        """Check before training whether this token may publish to `repo_id` ("name" or "owner/name").

        The only request is `whoami`, and there is none without a token. Raise `dagster.Failure` with the fix if it may not.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

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
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code in (401, 403):
                raise dg.Failure(
                    f"the Hub rejects the token for publishing {repo_id}. {TOKEN_ADVICE}",
                    allow_retries=False,
                ) from error
            raise dg.Failure(
                f"push_to_hub is true, but the Hub at {api.endpoint} did not answer the permission check: {describe_hub_error(error)}. "
                "Materialize this asset again later."
            ) from error
        problem = missing_write_access(account, repo_id)
        if problem:
            raise dg.Failure(f"{problem} {TOKEN_ADVICE}", allow_retries=False)

    def upload_folder(
        self, folder: Path, repo_id: str, private: bool, commit_message: str
    ) -> tuple[str, str]:
        """Publish the content of a folder as one commit and return the commit's id and URL.

        Creates the repository if it does not exist; an existing one keeps its visibility. Raise `dagster.Failure` on any error: a
        release is published completely or not at all.
        """
        api = self._api()
        try:
            commit = upload(api, folder, repo_id, private, commit_message, report=_warn)
        except Exception as error:
            raise dg.Failure(
                f"{folder} could not be published as {repo_id}: {describe_hub_error(error)}. The release stays on disk; materialize this asset "
                "again to publish it."
            ) from error
        return commit.oid, commit.commit_url

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a stage uses the same Hub."""
        return {} if self.endpoint is None else {"HF_ENDPOINT": self.endpoint}

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint or os.environ.get("HF_ENDPOINT"))


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
