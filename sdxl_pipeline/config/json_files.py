"""JSON files read strictly: a key given twice, NaN or a syntax error is a problem with its place, never a surprise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sdxl_pipeline.config.problems import NO_VALUE, Problem


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated: dict[str, list[Any]] = {}
        for key, _ in pairs:
            if key in seen:
                self.repeated[key] = [value for other, value in pairs if other == key]
            seen.add(key)


def read_json(path: Path, what: str) -> tuple[Any, list[Problem]]:
    """Return the content of a JSON file and what is wrong with it; `what` says what the file is for.

    The content is None, with a problem, if the file cannot be read or holds null.
    """
    try:
        if (
            path.exists() and not path.is_file() and not path.is_dir()
        ):  # a pipe has no end, and no writer to wait for
            message = "is a pipe, a socket or a device, not a file"
            return None, [Problem(path, "", NO_VALUE, message, f"write a file in its place: {what}")]
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None, [Problem(path, "", NO_VALUE, "the file does not exist", f"create it: {what}")]
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
        # counted as the decoder counts: str.splitlines knows other line ends, and no empty last line
        line = text.split("\n")[error.lineno - 1].strip()
        place = f"line {error.lineno}, column {error.colno}"
        hint = f"correct {place}: {line[:100]}" if line else f"write JSON: {what}"
        return None, [Problem(path, "", NO_VALUE, f"is not valid JSON: {error.msg} at {place}", hint)]
    except _RefusedConstantError as error:
        message = f"is not valid JSON: {error} is not a JSON number"
        return None, [Problem(path, "", NO_VALUE, message, "write a finite number, or null for not set")]
    except UnicodeEncodeError as error:
        message = f"holds half a character: {error.object[error.start : error.end]!a}"
        return None, [
            Problem(path, "", NO_VALUE, message, "write the whole character, or both of its halves")
        ]
    except ValueError as error:  # a number of thousands of digits
        return None, [Problem(path, "", NO_VALUE, f"cannot be read: {error}", "write a shorter number")]
    except RecursionError:
        return None, [Problem(path, "", NO_VALUE, "is nested too deeply", f"write JSON: {what}")]
    if content is None:
        return None, [Problem(path, "", NO_VALUE, "holds null", f"write {what}")]
    return content, [
        Problem(path, where, values, "the key is given more than once in one object", "keep one of them")
        for where, values in repeated
    ]


class _RefusedConstantError(Exception):
    """NaN, Infinity or -Infinity, which Python reads and JSON does not know."""


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
