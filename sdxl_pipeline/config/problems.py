"""What is wrong in a user's files, told so that it can be put right in one go."""

import json
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.credentials import fit_to_show


class _NoValue:
    """Marks a problem that is not about one value, such as a missing file."""

    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE: Final = _NoValue()


@dataclass(frozen=True)
class Problem:
    """One thing to put right.

    `file` is the file it stands in, `key` the key as the user wrote it ("" for the file as a whole; `[2] "cats".crop` for a key of
    the dataset entry with that position and id), `value` what was written (`NO_VALUE` where there is none), `message` what is wrong
    with it, `hint` what to write instead. A value that is, or may hold, a secret is replaced before it is kept.
    """

    file: Path
    key: str
    value: Any
    message: str
    hint: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", fit_to_show(self.key, self.value))

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else str(self.file)
        shown = "" if self.value is NO_VALUE else f" = {_shown(self.value)}"
        return f"{where}{shown}\n    {self.message}\n    -> {self.hint}"


class ProjectError(Exception):
    """Every problem of a project's files at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        if not self.problems:
            raise ValueError("a ProjectError needs at least one problem")
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = "1 problem to put right:" if count == 1 else f"{count} problems to put right:"
        return "\n\n".join([head, *(str(problem) for problem in self.problems)])


@contextmanager
def only_project_errors(place: Path) -> Iterator[None]:
    """Turn an exception that nobody foresaw into a ProjectError about `place`, so that it stops this project alone."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        last_line = traceback.format_exception_only(error)[-1].strip()
        problem = Problem(
            place,
            "",
            NO_VALUE,
            f"cannot be read because of a fault of this program: {last_line} ({Path(at.filename).name}, line {at.lineno})",
            "undo the last change to the project's files, and report the fault with these lines",
        )
        raise ProjectError([problem]) from error


def _shown(value: Any, limit: int = 80) -> str:
    """A value as JSON writes it, cut to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
