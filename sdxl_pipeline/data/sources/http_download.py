"""Download of an image from an http or https URL, with limits of size and time."""

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import local
from typing import Any, Final

from sdxl_pipeline.config.credentials import without_credentials
from sdxl_pipeline.data.decoding.image_formats import HEAD_BYTES, suffix_of
from sdxl_pipeline.data.sources.address_guard import AddressGuard, guarded_session
from sdxl_pipeline.data.sources.download import FetchError, wait_unless_stopped

CONNECT_TIMEOUT_SECONDS: Final = 10.0
READ_TIMEOUT_SECONDS: Final = 30.0
"""Maximum time without data from the server."""
MAX_SECONDS: Final = 600.0
MAX_BYTES: Final = 1 << 30
_RETRYABLE_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK_BYTES: Final = 1 << 16

_thread_local = local()


def download(url: str, target: Path, allow_private_addresses: bool = False) -> None:
    """Write the content of an http or https URL to `target`.

    Private addresses are rejected, also after a redirect, unless `allow_private_addresses`. Raises FetchError: not retryable for
    permanent errors such as 404 or an HTML page; retryable for 408, 425, 429 and 5xx (after the time in Retry-After), broken
    connections, timeouts and truncated bodies.
    """
    import requests

    try:
        with _session(allow_private_addresses).get(
            url, stream=True, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS)
        ) as response:
            if response.status_code != 200:
                raise FetchError(
                    f"{response.status_code} {response.reason}".strip(),
                    retryable=response.status_code in _RETRYABLE_STATUSES,
                    retry_after=_retry_after(response.headers.get("Retry-After")),
                )
            if int(response.headers.get("Content-Length") or 0) > MAX_BYTES:
                raise FetchError("the file is larger than 1 GiB")
            _write(response, target)
    except requests.exceptions.InvalidSchema as error:
        raise FetchError("the URL's protocol is unknown") from error
    except requests.exceptions.TooManyRedirects as error:
        raise FetchError("too many redirects") from error
    except requests.exceptions.SSLError as error:
        raise FetchError("the server's certificate is not trusted") from error
    except requests.exceptions.Timeout as error:
        raise FetchError(f"no answer for {READ_TIMEOUT_SECONDS:g} s", retryable=True) from error
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as error:
        raise FetchError("the connection broke before all bytes were received", retryable=True) from error
    except requests.exceptions.ConnectionError as error:
        raise FetchError(f"no connection ({_cause(error)})", retryable=True) from error
    except (requests.exceptions.RequestException, ValueError) as error:
        raise FetchError("not a valid URL") from error


def _session(allow_private_addresses: bool) -> Any:
    """Return the session of the calling thread, which keeps connections open; sessions are not thread-safe."""
    sessions: dict[bool, Any] = _thread_local.__dict__.setdefault("sessions", {})
    if allow_private_addresses not in sessions:
        import requests

        session = requests.Session() if allow_private_addresses else guarded_session(AddressGuard())
        # The length of a compressed body does not reveal whether it is complete.
        session.headers.update(
            {
                "User-Agent": "sdxl-pipeline (requests)",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            }
        )
        sessions[allow_private_addresses] = session
    return sessions[allow_private_addresses]


def _write(response: Any, target: Path) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_text = content_type.startswith("text/") or content_type in ("application/json", "application/xml")
    received = 0
    with target.open("wb") as file:
        for chunk in response.iter_content(_CHUNK_BYTES):
            if received == 0 and is_text and not suffix_of(chunk[:HEAD_BYTES]):
                raise FetchError(f"the server sent {content_type} instead of an image")
            received += file.write(chunk)
            wait_unless_stopped()
            if received > MAX_BYTES:
                raise FetchError("the file is larger than 1 GiB")
            if time.monotonic() > deadline:
                raise FetchError(f"the download took more than {MAX_SECONDS:g} s", retryable=True)
    if received == 0:
        raise FetchError("the file is empty")


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has a number or a date; None if it is missing or invalid."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _cause(error: BaseException) -> str:
    """Return a short text of the innermost cause of a failed connection."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return without_credentials(str(error).split("\n", 1)[0])[:120] or type(error).__name__
