"""The Hugging Face Hub, as far as releases need it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from sdxl_pipeline.hub_client import explain, repeat_while_busy, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN_ADVICE = (
    "Set HF_TOKEN to a token with write permission (https://huggingface.co/settings/tokens), or run `hf auth login`; "
    "or set push_to_hub to false in config.json, and the release stays on disk."
)
WRITING_ROLES = {"write", "admin", "contributor"}


class HubResource(dg.ConfigurableResource):
    """Publishes releases. The token is the Hub's client's own business (HF_TOKEN or `hf auth login`) and is no field here."""

    endpoint: str | None = Field(
        default=None,
        description="URL of a Hub other than https://huggingface.co; not set: the environment variable HF_ENDPOINT.",
    )

    def check_can_push(self, repo_id: str) -> None:
        """Find out, before money is spent on training, whether this token may publish as `repo_id` ("name" or "owner/name").

        Asks the Hub who the token belongs to and nothing else; without a token it asks nothing. Raises `dagster.Failure` that says
        what to do.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        if get_token() is None:
            raise dg.Failure(
                f"push_to_hub is true, but there is no token to publish {repo_id} with. {TOKEN_ADVICE}",
                allow_retries=False,
            )
        api = self._api()
        try:
            account = repeat_while_busy(api.whoami, "Asking the Hub whose the token is", _warn)
        except Exception as error:
            # The client passes on the errors of its HTTP library, which have no base in common with its own.
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code in (401, 403):
                raise dg.Failure(
                    f"the Hub does not accept the token that {repo_id} is to be published with. {TOKEN_ADVICE}",
                    allow_retries=False,
                ) from error
            raise dg.Failure(
                f"push_to_hub is true, but the Hub at {api.endpoint} cannot be asked whether it would take the release: {explain(error)}. "
                "Materialize this asset again later."
            ) from error
        problem = missing_write_access(account, repo_id)
        if problem:
            raise dg.Failure(f"{problem} {TOKEN_ADVICE}", allow_retries=False)

    def upload_folder(
        self, folder: Path, repo_id: str, private: bool, commit_message: str
    ) -> tuple[str, str]:
        """Publish the content of a folder as one commit; gives the commit's id and its URL.

        Creates the repository when there is none; an existing one keeps its visibility. Raises `dagster.Failure` when anything at
        all goes wrong: a release is published or it is not.
        """
        api = self._api()
        try:
            commit = upload(api, folder, repo_id, private, commit_message, report=_warn)
        except Exception as error:
            raise dg.Failure(
                f"{folder} could not be published as {repo_id}: {explain(error)}. The release stays on disk; materialize this asset "
                "again to publish it."
            ) from error
        return commit.oid, commit.commit_url

    def environment(self) -> dict[str, str]:
        """Return what a stage needs to use the same Hub."""
        return {} if self.endpoint is None else {"HF_ENDPOINT": self.endpoint}

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint or os.environ.get("HF_ENDPOINT"))


def _warn(message: str) -> None:
    dg.get_dagster_logger().warning(message)


def missing_write_access(account: dict[str, Any], repo_id: str) -> str | None:
    """Why the account and token that the Hub's whoami describes cannot write to a repository; None when they can.

    The Hub gives every token a role: "read", "write", or "fineGrained" with permissions per user, organization or repository.
    """
    user = account["name"]
    owner = repo_id.partition("/")[0] if "/" in repo_id else user
    organizations = {entry["name"]: entry.get("roleInOrg") for entry in account.get("orgs", [])}
    if owner != user:
        if owner not in organizations:
            return f"{repo_id} belongs to {owner}, but the token belongs to {user}, who is no member there; correct hub_model_id."
        role = organizations[owner]
        if role is not None and role not in WRITING_ROLES:
            return f"{user} may only {role} in the organization {owner}, and so cannot publish {repo_id}."
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return f"the token may only read, and so cannot publish {repo_id}."
    if token.get("role") == "fineGrained":
        writable = {
            scope["entity"].get("name")
            for scope in token.get("fineGrained", {}).get("scoped", [])
            if "repo.write" in scope.get("permissions", [])
        }
        if not writable & {owner, f"{owner}/{repo_id.rpartition('/')[2]}"}:
            return f"the fine-grained token has no write permission for repositories of {owner}, and so cannot publish {repo_id}."
    return None
