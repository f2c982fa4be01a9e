"""Hugging Face Hub calls with retries while the Hub is overloaded or unavailable.

huggingface_hub retries some requests itself (file uploads, commits, listings) and others never (whoami, creating a repository, resolving
a revision), so whole calls are retried here. Every one of them is safe to retry: none leaves a partial result.
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import tenacity

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import CommitInfo, HfApi

T = TypeVar("T")

MAX_ATTEMPTS: Final = 6
MAX_WAIT_SECONDS: Final = 300.0
"""A longer wait requested by the Hub is not retried."""
RETRYABLE_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})

first_wait_seconds = 1.0
max_silence_seconds = 300.0
"""Time without a byte from the Hub after which a call has failed; huggingface_hub itself waits forever."""

TOKEN_ADVICE: Final = (
    "Set HF_TOKEN to a token with write permission (https://huggingface.co/settings/tokens), or run `hf auth login`; "
    "or set push_to_hub to false in config.json to write the release to disk only."
)
_QUOTA_ADVICE: Final = (
    "Free storage or upgrade the plan of the repository's owner (https://huggingface.co/settings/billing), publish under another "
    "owner (hub_model_id), or set push_to_hub to false in config.json to write the release to disk only."
)
_NEXT_STEPS: Final = {
    400: "Correct the named value in config.json (the model card is made from it).",
    401: TOKEN_ADVICE,
    403: TOKEN_ADVICE,
    404: "Check hub_model_id and HF_ENDPOINT, and that the token may read the repository.",
    409: "Wait until other uploads to the repository have ended, or set another hub_model_id.",
    412: "Wait until other uploads to the repository have ended.",
}
"""What to do about a status that a retry does not change."""

logger = logging.getLogger(__name__)


def retry_while_busy(
    call: Callable[[], T],
    what: str,
    report: Callable[[str], object] = logger.warning,
    retry_connection_errors: bool = True,
    also: Collection[int] = (),
) -> T:
    """Return the call's value, retried after HTTP 408, 429 and 5xx, the statuses in `also`, and answers that are not JSON.

    The wait is what the Hub requests, or an exponential backoff with jitter. `what` names the call in the lines passed to `report` before
    each wait. With `retry_connection_errors`, broken connections and timeouts are retried as well; pass False where a local cache can replace
    the Hub. After `MAX_ATTEMPTS` attempts the last error is raised.
    """

    def is_retryable(error: BaseException) -> bool:
        response = _response(error)
        if response is None:
            return retry_connection_errors and _is_connection_error(error)
        return (
            response.status_code in {*RETRYABLE_STATUSES, *also}
            and (_requested_wait(response) or 0.0) <= MAX_WAIT_SECONDS
        )

    def wait(state: tenacity.RetryCallState) -> float:
        response = _response(state.outcome.exception()) if state.outcome else None
        backoff = tenacity.wait_exponential_jitter(first_wait_seconds, 60.0, jitter=first_wait_seconds)(state)
        return max(backoff, (response and _requested_wait(response)) or 0.0)

    def log_retry(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        report(
            f"{what}: {describe_hub_error(error)}. Attempt {state.attempt_number + 1} of {MAX_ATTEMPTS} in {seconds:.0f} s."
        )

    def attempt() -> T:
        from huggingface_hub import get_session

        get_session().timeout = max_silence_seconds
        return call()

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_retryable),
        wait=wait,
        stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
        before_sleep=log_retry,
        reraise=True,
    )(attempt)


def upload(
    api: "HfApi",
    folder: Path,
    repo_id: str,
    private: bool,
    message: str,
    path_in_repo: str | None = None,
    report: Callable[[str], object] = logger.warning,
) -> "CommitInfo":
    """Upload the content of a folder as one commit, creating the repository if it does not exist, and return the commit."""
    repo_id = create_repository(api, repo_id, private, report)
    return retry_while_busy(
        partial(
            api.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            path_in_repo=path_in_repo,
        ),
        f"Uploading to {repo_id}",
        report,
    )


def create_repository(
    api: "HfApi",
    repo_id: str,
    private: bool,
    report: Callable[[str], object] = logger.warning,
    also: Collection[int] = (),
) -> str:
    """Create a model repository if it does not exist, and return its full id; an existing one keeps its visibility."""

    def create() -> str:
        try:
            return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # huggingface_hub expects the repository's URL in the response to a conflict
        except (KeyError, json.JSONDecodeError) as error:
            raise ConflictError(
                f"the Hub rejected the creation of {repo_id} without a reason; another run may be creating it. Try again, or set "
                "another hub_model_id"
            ) from error

    return retry_while_busy(create, f"Creating {repo_id}", report, also=also)


class HubRefusalError(Exception):
    """A state of the repository that the client does not report as an error; the message is the reason."""


class ConflictError(HubRefusalError):
    """A conflict for which the Hub sent no reason; it is retried."""


def describe_hub_error(error: BaseException | None) -> str:
    """Return one sentence, without a full stop and without tokens, on why a Hub call failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    response = None if error is None else _response(error)
    if isinstance(error, HubRefusalError):
        return without_secrets(str(error))
    if isinstance(error, ValueError) and response is not None and response.status_code == 400:
        return without_secrets(" ".join(lines))  # of the model card's metadata, one line per error
    if isinstance(error, json.JSONDecodeError):
        return "the answer is not JSON: it was cut off, or a gateway's error page"
    if response is None:
        return without_secrets(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
    status, message_from_hub = response.status_code, response.headers.get("x-error-message", "").strip()
    if status < 409 and message_from_hub:
        return without_secrets(f"HTTP {status}: {message_from_hub}")
    reason = {
        401: "the Hub rejects the token",
        402: "the Hub requires a payment",
        403: "the Hub denies the permission",
        404: "there is no such repository, or the token may not read it",
        409: "the repository is being changed by another upload, or its name is taken",
        412: "the repository was changed by another upload meanwhile",
        429: "the Hub's rate limit is reached",
    }.get(status, "the Hub is unavailable" if status >= 500 else "")
    text = message_from_hub or reason or (lines or [""])[0]
    return without_secrets(f"HTTP {status}: {text}" + (f" ({reason})" if message_from_hub and reason else ""))


def next_step(error: BaseException) -> str:
    """Return what the user changes before trying again, in sentences; empty where trying again later is enough."""
    response = _response(error)
    if response is None:
        return ""
    if response.status_code == 402 or (response.status_code == 403 and _is_about_quota(response)):
        return _QUOTA_ADVICE
    return _NEXT_STEPS.get(response.status_code, "")


def is_rejection(error: BaseException) -> bool:
    """Return whether the Hub answered that it did not do what was asked; after 5xx and without an answer it may have."""
    response = _response(error)
    return response is not None and response.status_code < 500


def is_lasting(error: BaseException) -> bool:
    """Return whether the same call fails again until its token, its content or the account changes."""
    response = _response(error)
    return response is not None and response.status_code in (400, 401, 402, 403, 404)


def without_secrets(text: str) -> str:
    """Return a text without the token in use, strings that look like a token, and the signatures in URLs."""
    from huggingface_hub import get_token

    for token in filter(None, {(get_token() or ""), repr(get_token() or "")[1:-1]}):
        text = text.replace(token, "hf_***")
    return re.sub(
        r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", re.sub(r"\bhf_[A-Za-z0-9]{20,}", "hf_***", text)
    )


def has_secrets(error: BaseException) -> bool:
    """Return whether the message of an error, or of one of its causes, must not be logged."""
    return any(without_secrets(str(cause)) != str(cause) for cause in _causes(error))


def _is_about_quota(response: "Response") -> bool:
    message = response.headers.get("x-error-message", "").lower()
    return any(word in message for word in ("storage", "quota", "upgrade your plan"))


def _response(error: BaseException | None) -> "Response | None":
    """Return the Hub's response behind an error, following its causes."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response
    return None


def _is_connection_error(error: BaseException) -> bool:
    import httpx2

    # an answer that is not JSON is a gateway's error page, or cut off
    kinds = (
        ConflictError,
        httpx2.TimeoutException,
        httpx2.NetworkError,
        httpx2.RemoteProtocolError,
        json.JSONDecodeError,
    )
    return any(isinstance(cause, kinds) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _requested_wait(response: "Response") -> float | None:
    """Return the wait in seconds that a response requests by Retry-After (seconds or a date) or by the Hub's RateLimit header."""
    from huggingface_hub.utils import parse_ratelimit_headers

    retry_after = response.headers.get("retry-after", "").strip()
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        limit = parse_ratelimit_headers(response.headers)
        return None if limit is None or limit.remaining else float(limit.reset_in_seconds)
