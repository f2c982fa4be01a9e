"""Calls of the Hugging Face Hub, made again while the Hub is busy or out of order.

huggingface_hub repeats some requests by itself (uploads of files, commits, listings) and others never (whoami, creating a repository,
asking for a revision), so a whole call is repeated here. All of them may be repeated: none leaves something half done.
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

TRIES: Final = 6
LONGEST_WAIT_SECONDS: Final = 300.0
"""A Hub that asks to wait for longer is not waited for."""
TEMPORARY: Final = frozenset({408, 429, 500, 502, 503, 504})

first_wait_seconds = 1.0

logger = logging.getLogger(__name__)


def repeat_while_busy(
    call: Callable[[], T],
    what: str,
    report: Callable[[str], object] = logger.warning,
    over_connections: bool = True,
) -> T:
    """Return the call's value; repeat it after HTTP 408, 429 and 5xx, waiting as long as the Hub asks, else ever longer.

    `what` names the call in the lines that go to `report` before each wait. With `over_connections`, broken connections and timeouts
    count as well; where a cache can stand in for the Hub they had better not. After `TRIES` tries the last error is raised.
    """

    def is_temporary(error: BaseException) -> bool:
        answer = _answer(error)
        if answer is None:
            return over_connections and _is_connection_error(error)
        return answer.status_code in TEMPORARY and (_asked_wait(answer) or 0.0) <= LONGEST_WAIT_SECONDS

    def wait(state: tenacity.RetryCallState) -> float:
        answer = _answer(state.outcome.exception()) if state.outcome else None
        grown = tenacity.wait_exponential_jitter(first_wait_seconds, 60.0, jitter=first_wait_seconds)(state)
        return max(grown, (answer and _asked_wait(answer)) or 0.0)

    def announce(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        report(f"{what}: {explain(error)}. Try {state.attempt_number + 1} of {TRIES} in {seconds:.0f} s.")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_temporary),
        wait=wait,
        stop=tenacity.stop_after_attempt(TRIES),
        before_sleep=announce,
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
    """Add the content of a folder to a repository as one commit, and return the commit; a repository that is not there is created."""
    create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
    try:
        repo = repeat_while_busy(create, f"Creating {repo_id}", report)
    except (
        KeyError,
        ValueError,
    ) as error:  # huggingface_hub looks for the repository's address in the answer to a conflict
        raise HubRefusalError(
            f"the Hub refused to create {repo_id} without saying why; it may be being created by another run. Try again, or write "
            "another hub_model_id"
        ) from error
    return repeat_while_busy(
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
    """What the Hub did not say itself."""


def explain(error: BaseException | None) -> str:
    """Return in one sentence, without its full stop, why a call of the Hub failed."""
    answer = None if error is None else _answer(error)
    if isinstance(error, HubRefusalError):
        return str(error)
    if answer is None:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    status, said = answer.status_code, answer.headers.get("x-error-message", "").strip()
    reason = {
        409: "the repository is being changed by another upload, or its name is taken",
        429: "the Hub's rate limit is reached",
    }.get(status, "the Hub is out of order" if status >= 500 else "")
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"HTTP {status}: {said or reason or first_line}" + (f" ({reason})" if said and reason else "")


def _answer(error: BaseException | None) -> "Response | None":
    """Return the Hub's answer behind an error; where a cache was asked in its place, that of the error before it."""
    from huggingface_hub.errors import HfHubHTTPError

    for each in _causes(error):
        if isinstance(each, HfHubHTTPError):
            return each.response
    return None


def _is_connection_error(error: BaseException) -> bool:
    import httpx2

    kinds = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
    return any(isinstance(each, kinds) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _asked_wait(answer: "Response") -> float | None:
    """Return how many seconds an answer asks to wait: by Retry-After, as a number or a date, or by the Hub's own RateLimit header."""
    from huggingface_hub.utils import parse_ratelimit_headers

    written = answer.headers.get("retry-after", "").strip()
    if written.isdigit():
        return float(written)
    try:
        return max(0.0, (parsedate_to_datetime(written) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        limit = parse_ratelimit_headers(answer.headers)
        return None if limit is None or limit.remaining else float(limit.reset_in_seconds)
