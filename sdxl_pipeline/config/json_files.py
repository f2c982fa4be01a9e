"""Strict JSON files: a repeated key, NaN or a syntax error is reported as a problem with its position."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sdxl_pipeline.config.problems import NO_VALUE, Problem


class _Object(dict[str, Any]):
    """A JSON object that records repeated keys."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated: dict[str, list[Any]] = {}
        for key, _ in pairs:
            if key in seen:
                self.repeated[key] = [value for other, value in pairs if other == key]
            seen.add(key)


def read_json(path: Path, expected: str) -> tuple[Any, list[Problem]]:
    """Return the content of a JSON file and its problems; `expected` describes the valid content for hints.

    The content is None, with a problem, if the file cannot be read or contains null.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would block
            message = "is a pipe, a socket or a device, not a file"
            return None, [Problem(path, "", NO_VALUE, message, f"replace it by a file: {expected}")]
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None, [Problem(path, "", NO_VALUE, "the file does not exist", f"create it: {expected}")]
    except UnicodeDecodeError as error:
        return None, [Problem(path, "", NO_VALUE, f"is not UTF-8 (byte {error.start})", "save it as UTF-8")]
    except OSError as error:
        return None, [
            Problem(
                path, "", NO_VALUE, f"cannot be read: {error.strerror or error}", "make it a readable file"
            )
        ]
    try:
        content = json.loads(text, object_pairs_hook=_Object, parse_constant=_refuse_constant)
        repeated = list(_repeated(content, ""))
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        # lines as the decoder counts them: str.splitlines has other line ends, and no empty last line
        line = text.split("\n")[error.lineno - 1].strip()
        position = f"line {error.lineno}, column {error.colno}"
        hint = f"correct {position}: {line[:100]}" if line else f"write JSON: {expected}"
        return None, [Problem(path, "", NO_VALUE, f"is not valid JSON: {error.msg} at {position}", hint)]
    except _RefusedConstantError as error:
        message = f"is not valid JSON: {error} is not a JSON number"
        return None, [Problem(path, "", NO_VALUE, message, "write a finite number, or null for not set")]
    except UnicodeEncodeError as error:
        message = f"contains half of a surrogate pair: {error.object[error.start : error.end]!a}"
        return None, [Problem(path, "", NO_VALUE, message, "write the character itself, or both surrogates")]
    except ValueError as error:  # a number with thousands of digits
        return None, [Problem(path, "", NO_VALUE, f"cannot be read: {error}", "write a shorter number")]
    except RecursionError:
        return None, [Problem(path, "", NO_VALUE, "is nested too deeply", f"write JSON: {expected}")]
    if content is None:
        return None, [Problem(path, "", NO_VALUE, "contains null", f"write {expected}")]
    return content, [
        Problem(path, where, values, "the key is repeated in one object", "remove all but one of them")
        for where, values in repeated
    ]


class _RefusedConstantError(Exception):
    """NaN, Infinity or -Infinity, which Python accepts but JSON does not allow."""


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedConstantError(name)


def _repeated(content: Any, where: str) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(content, _Object):
        for key, values in content.repeated.items():
            yield f"{where}{key}", values
        for key, value in content.items():
            yield from _repeated(value, f"{where}{key}.")
    elif isinstance(content, list):
        for index, item in enumerate(content):
            yield from _repeated(item, f"{where}[{index + 1}].")
