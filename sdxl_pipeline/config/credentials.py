"""Redaction of secrets in settings, in URLs and in error messages of libraries."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "(hidden)"

_SECRET_KEYS: Final = (
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "webhook_url",
    "callback_url",
)
_SECRET_WORD = re.compile(r"secret|token(?!izer)|passw|credential|access_?key|api_?key", re.IGNORECASE)
# The URL of a webhook is a secret, and may be written instead of the path of its file.
_ADDRESS_KEY = re.compile(r"webhook|callback", re.IGNORECASE)
# The second form is a password that contains a slash, as AWS generates them; digits after the colon are a port.
_USER_INFO = re.compile(
    r"""(?<=://)(?:[^/?#\s"'<>]*@|[^/:@\s"'<>]+:(?!\d+/)[^?#\s"'<>]*@)""",
)
_QUERY = re.compile(r"(?P<address>[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>?#]*)\?[^\s\"'<>]*")


def without_credentials(text: str) -> str:
    """Return the text with user name, password and query string (which may be a signature) removed from every URL."""
    return _QUERY.sub(r"\g<address>", _USER_INFO.sub("", text))


def has_credentials(url: str) -> bool:
    """Return whether a URL contains a user name, a password or a query string."""
    return without_credentials(url) != url


def redact(key: str, value: Any) -> Any:
    """Return a value as it may appear in a message: redacted if the key, even misspelled, suggests a secret."""
    if _is_secret(key.rsplit(".", 1)[-1]) and not isinstance(value, bool | None):
        return HIDDEN
    if _ADDRESS_KEY.search(key) and "://" in str(value):
        return HIDDEN
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {name: redact(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [redact("", item) for item in value]
    return value


def _is_secret(key: str) -> bool:
    return bool(
        _SECRET_WORD.search(key) or difflib.get_close_matches(key.lower(), _SECRET_KEYS, n=1, cutoff=0.8)
    )
