"""Digests of plain values: equal values give equal digests, in every process and on every machine."""

import hashlib
import json
from typing import Any


def digest_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in one canonical spelling: keys sorted, no spaces, UTF-8.

    Tuples count as lists. Raises TypeError for what is not plain data, and ValueError for NaN and infinities, which JSON cannot
    say. Integers and floats differ (1 is not 1.0), so cast a value whose type may vary before digesting it.
    """
    _refuse_other_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_other_keys(value: Any) -> None:
    # json would silently turn the key 1 into "1", and two different values would share a digest
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a digested mapping has the key {key!r}; only strings may be keys")
            _refuse_other_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_other_keys(item)
