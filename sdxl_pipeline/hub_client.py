"""Hugging Face Hub calls with retries while the Hub is overloaded or unavailable.

huggingface_hub retries some requests itself (file uploads, commits, listings) and others never (whoami, creating a repository, resolving
a revision), so whole calls are retried here. Every one of them is safe to retry: none leaves a partial result.
"""

import logging
from collections.abc import Callable, Iterator
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

logger = logging.getLogger(__name__)


def retry_while_busy(
    call: Callable[[], T],
    what: str,
    report: Callable[[str], object] = logger.warning,
    retry_connection_errors: bool = True,
) -> T:
    """Return the call's value, retried after HTTP 408, 429 and 5xx.

    The wait is what the Hub requests, or an exponential backoff with jitter. `what` names the call in the lines passed to `report` before
    each wait. With `retry_connection_errors`, broken connections and timeouts are retried as well; pass False where a local cache can replace
    the Hub. After `MAX_ATTEMPTS` attempts the last error is raised.
    """

    def is_retryable(error: BaseException) -> bool:
        response = _response(error)
        if response is None:
            return retry_connection_errors and _is_connection_error(error)
        return (
            response.status_code in RETRYABLE_STATUSES
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

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_retryable),
        wait=wait,
        stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
        before_sleep=log_retry,
        reraise=True,
    )(call)


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
    create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
    try:
        repo = retry_while_busy(create, f"Creating {repo_id}", report)
    # huggingface_hub expects the repository's URL in the response to a conflict
    except (KeyError, ValueError) as error:
        raise HubRefusalError(
            f"the Hub rejected the creation of {repo_id} without a reason; another run may be creating it. Try again, or set "
            "another hub_model_id"
        ) from error
    return retry_while_busy(
        partial(
            api.upload_folder,
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=message,
            path_in_repo=path_in_repo,
        ),
        f"Uploading to {repo_id}",
        report,
    )


class HubRefusalError(Exception):
    """A rejection for which the Hub sent no reason."""


def describe_hub_error(error: BaseException | None) -> str:
    """Return one sentence, without a full stop, on why a Hub call failed."""
    response = None if error is None else _response(error)
    if isinstance(error, HubRefusalError):
        return str(error)
    if response is None:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    status, message_from_hub = response.status_code, response.headers.get("x-error-message", "").strip()
    reason = {
        409: "the repository is being changed by another upload, or its name is taken",
        429: "the Hub's rate limit is reached",
    }.get(status, "the Hub is unavailable" if status >= 500 else "")
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"HTTP {status}: {message_from_hub or reason or first_line}" + (
        f" ({reason})" if message_from_hub and reason else ""
    )


def _response(error: BaseException | None) -> "Response | None":
    """Return the Hub's response behind an error, following its causes."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response
    return None


def _is_connection_error(error: BaseException) -> bool:
    import httpx2

    kinds = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
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
