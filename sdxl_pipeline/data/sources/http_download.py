"""One image from one web address: whole, of a believable kind and size, or a reason why not."""

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

CONNECT_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 30.0
"""The server may be silent this long before the download counts as broken."""
LONGEST_SECONDS: Final = 600.0
LARGEST_BYTES: Final = 1 << 30
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK: Final = 1 << 16

_threads = local()


def download(address: str, target: Path, allow_private_addresses: bool = False) -> None:
    """Write the content of an http or https address to `target`.

    Private addresses are refused, that of a redirect too, unless `allow_private_addresses`. Raises FetchError: at once for an answer that will stay the same, such as 404 or a page of HTML; as one that another try may mend
    for 408, 425, 429 and 5xx (after the wait that Retry-After asks for), broken connections, silence, and bodies that end too early.
    """
    import requests

    try:
        with _session(allow_private_addresses).get(
            address, stream=True, timeout=(CONNECT_SECONDS, SILENCE_SECONDS)
        ) as answer:
            if answer.status_code != 200:
                raise FetchError(
                    f"{answer.status_code} {answer.reason}".strip(),
                    again=answer.status_code in _AGAIN,
                    wait=_wait_of(answer.headers.get("Retry-After")),
                )
            if int(answer.headers.get("Content-Length") or 0) > LARGEST_BYTES:
                raise FetchError("it is larger than 1 GiB")
            _write(answer, target)
    except requests.exceptions.InvalidSchema as error:
        raise FetchError("its protocol is not known") from error
    except requests.exceptions.TooManyRedirects as error:
        raise FetchError("it is redirected without end") from error
    except requests.exceptions.SSLError as error:
        raise FetchError("its certificate is not to be trusted") from error
    except requests.exceptions.Timeout as error:
        raise FetchError(f"no answer for {SILENCE_SECONDS:g} s", again=True) from error
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError) as error:
        raise FetchError("the connection broke before all bytes had come", again=True) from error
    except requests.exceptions.ConnectionError as error:
        raise FetchError(f"no connection ({_cause(error)})", again=True) from error
    except (requests.exceptions.RequestException, ValueError) as error:
        raise FetchError("it is no valid address") from error


def _session(allow_private_addresses: bool) -> Any:
    """Return a session of the calling thread: it keeps connections open, and is not made to be shared between threads."""
    sessions: dict[bool, Any] = _threads.__dict__.setdefault("sessions", {})
    if allow_private_addresses not in sessions:
        import requests

        session = requests.Session() if allow_private_addresses else guarded_session(AddressGuard())
        # A compressed body's length says nothing of whether all of it came.
        session.headers.update(
            {
                "User-Agent": "sdxl-pipeline (requests)",
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            }
        )
        sessions[allow_private_addresses] = session
    return sessions[allow_private_addresses]


def _write(answer: Any, target: Path) -> None:
    give_up = time.monotonic() + LONGEST_SECONDS
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_text = kind.startswith("text/") or kind in ("application/json", "application/xml")
    came = 0
    with target.open("wb") as file:
        for chunk in answer.iter_content(_CHUNK):
            if came == 0 and is_text and not suffix_of(chunk[:HEAD_BYTES]):
                raise FetchError(f"{kind} came instead of an image")
            came += file.write(chunk)
            wait_unless_stopped()
            if came > LARGEST_BYTES:
                raise FetchError("it is larger than 1 GiB")
            if time.monotonic() > give_up:
                raise FetchError(f"it did not come within {LONGEST_SECONDS:g} s", again=True)
    if came == 0:
        raise FetchError("it is empty")


def _wait_of(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number of them, or a date."""
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
    """The innermost reason of a failed connection, in a few words."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return without_credentials(str(error).split("\n", 1)[0])[:120] or type(error).__name__
