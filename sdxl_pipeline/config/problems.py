"""Problems of a user's files, collected so that all are reported at once."""

import json
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.credentials import redact


class _NoValue:
    """Marks a problem without a value, such as a missing file."""

    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE: Final = _NoValue()


@dataclass(frozen=True)
class Problem:
    """One problem of a file.

    `file` is its path, `key` the key as the user wrote it ("" for the file itself; `[2] "cats".crop` for a key of the dataset entry with
    that position and id), `value` what was written (`NO_VALUE` if nothing), `message` what is wrong with it, `hint` what to write instead.
    A value that is, or may contain, a secret is redacted on construction.
    """

    file: Path
    key: str
    value: Any
    message: str
    hint: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", redact(self.key, self.value))

    def __str__(self) -> str:
        location = f"{self.file}: {self.key}" if self.key else str(self.file)
        value = "" if self.value is NO_VALUE else f" = {_short_json(self.value)}"
        return f"{location}{value}\n    {self.message}\n    -> {self.hint}"


class ProjectError(Exception):
    """All problems of a project's files."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        if not self.problems:
            raise ValueError("a ProjectError needs at least one problem")
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = "1 problem:" if count == 1 else f"{count} problems:"
        return "\n\n".join([head, *(str(problem) for problem in self.problems)])


@contextmanager
def as_project_errors(path: Path) -> Iterator[None]:
    """Convert an unexpected exception to a ProjectError about `path`, so that it fails this project only."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        last_line = traceback.format_exception_only(error)[-1].strip()
        problem = Problem(
            path,
            "",
            NO_VALUE,
            f"cannot be read because of a bug in this program: {last_line} ({Path(at.filename).name}, line {at.lineno})",
            "undo the last change to the project's files, and report the bug with this message",
        )
        raise ProjectError([problem]) from error


def _short_json(value: Any, limit: int = 80) -> str:
    """Return a value as JSON, truncated to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
