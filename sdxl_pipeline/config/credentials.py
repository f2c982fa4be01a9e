"""What must never be shown: secrets that stand in settings, in addresses, and in what libraries say of them."""

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
# Who knows the address of a webhook may post there, and it may stand in the place of the file that holds it.
_ADDRESS_KEY = re.compile(r"webhook|callback", re.IGNORECASE)
# The second form is a password with a slash in it, as AWS makes them; what looks like a port is none.
_USER_INFO = re.compile(
    r"""(?<=://)(?:[^/?#\s"'<>]*@|[^/:@\s"'<>]+:(?!\d+/)[^?#\s"'<>]*@)""",
)
_QUERY = re.compile(r"(?P<address>[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>?#]*)\?[^\s\"'<>]*")


def without_credentials(text: str) -> str:
    """The text with every URL in it shown without user name, password and query string, where signatures stand."""
    return _QUERY.sub(r"\g<address>", _USER_INFO.sub("", text))


def holds_credentials(url: str) -> bool:
    """Whether a URL carries a user name, a password or a query string."""
    return without_credentials(url) != url


def fit_to_show(key: str, value: Any) -> Any:
    """A value as it may stand in a message: hidden where the key, however it is misspelled, speaks of a secret."""
    if _is_secret(key.rsplit(".", 1)[-1]) and not isinstance(value, bool | None):
        return HIDDEN
    if _ADDRESS_KEY.search(key) and "://" in str(value):
        return HIDDEN
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {name: fit_to_show(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [fit_to_show("", item) for item in value]
    return value


def _is_secret(key: str) -> bool:
    return bool(
        _SECRET_WORD.search(key) or difflib.get_close_matches(key.lower(), _SECRET_KEYS, n=1, cutoff=0.8)
    )
