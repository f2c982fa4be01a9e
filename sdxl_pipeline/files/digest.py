"""Digests of JSON values: equal values give equal digests in every process and on every machine."""

import hashlib
import json
from typing import Any


def digest_json(value: Any) -> str:
    """Return the hex SHA-256 of a JSON value in canonical form: sorted keys, no spaces, UTF-8.

    Tuples count as lists. Raises TypeError for values outside JSON's types, and ValueError for NaN and infinities, which JSON cannot
    represent. Integers and floats differ (1 is not 1.0), so cast a value whose type may vary before digesting it.
    """
    _require_string_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_string_keys(value: Any) -> None:
    # json would silently convert the key 1 to "1", so two different values would share a digest
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a digested mapping has the key {key!r}; only strings may be keys")
            _require_string_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_string_keys(item)
