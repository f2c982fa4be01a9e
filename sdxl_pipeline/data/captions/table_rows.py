"""Rows and cells of CSV, JSON and Parquet tables, and notes on rows that match no file.

A table is read completely or rejected with the line: a misread row would silently train on wrong captions.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Final

from sdxl_pipeline.data.captions.text_files import OK, decode_text

Row = tuple[int, Mapping[str, Any]]
"""(line where the row begins, or its 1-based number in a table without lines; cells by column)."""

_MAX_FIELD_CHARACTERS: Final = 1 << 24
_MAX_EXAMPLES: Final = 3
_MAX_CAUSES: Final = 5


class TableError(ValueError):
    """Content of a table that cannot be read. The message has the line, the problem and what to write instead."""


def csv_rows(text: str, delimiter: str = ",") -> Iterator[Row]:
    """Yield the rows of a CSV text, whose first line is the header; blank lines are skipped.

    Raises TableError with the line for a row with more or fewer fields than the header, for a quotation mark that is not closed or
    closed in the middle of a field, and for a duplicate column in the header.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    unclosed_quote = re.compile(
        r"\n\"?[^\n\"]*\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif)\"?" + re.escape(delimiter), re.IGNORECASE
    )
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise TableError(
                f"line {line}: the row that begins here cannot be read ({error}, at line {reader.line_num}). Close each quotation mark "
                'that opens a value, and write "" for one within a quoted value.'
            ) from error
        if fields is None:
            return
        if not any(field.strip() for field in fields) and len(fields) < 2:
            continue
        if header is None:
            header = [field.strip() for field in fields]
            duplicates = [name for name, count in Counter(header).items() if name and count > 1]
            if duplicates:
                raise TableError(
                    f"line {line}: the header has the column {duplicates[0]!r} twice. Rename one of them."
                )
            continue
        if len(fields) != len(header):
            count = f"{len(fields)} field" + "s" * (len(fields) != 1)
            hint = (
                f'Put a value that contains "{delimiter}" in double quotes.'
                if len(fields) > len(header)
                else "Write a value for each column; it may be empty."
            )
            raise TableError(f"line {line} has {count}, and the header has {len(header)}. {hint}")
        if any("\n" in field and unclosed_quote.search(field) for field in fields):
            raise TableError(
                f"line {line}: the quoted value that begins here seems to contain further rows. Close its quotation mark."
            )
        yield line, dict(zip(header, fields, strict=True))


def json_rows(text: str) -> Iterator[Row]:
    """Yield the objects of a JSON list or of JSON Lines. Raise TableError with the line or entry that is not an object."""
    if text.lstrip().startswith("["):
        try:
            entries = list(enumerate(json.loads(text), start=1))
        except ValueError as error:
            raise TableError(
                f"the table is not a valid JSON list: {error}. Correct it, or write the table again."
            ) from error
        unit = "entry"
    else:
        lines = enumerate(text.split("\n"), start=1)
        entries = [(number, _parse(line, number)) for number, line in lines if line.strip()]
        unit = "line"
    for number, row in entries:
        if not isinstance(row, dict):
            raise TableError(
                f'{unit} {number} is not a JSON object. Write {{"filename": "a.png", "caption": "..."}}.'
            )
        yield number, row


def cell_texts(value: Any, column: str) -> list[str]:
    """Return the non-blank captions in a cell, trimmed: its text, or each text of a list; UTF-8 bytes are text.

    Raises TableError for anything else, including numbers: a numeric column usually holds labels or ids rather than captions.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = [_cell_text(item, column, within_list=values is value) for item in values]
    return [text for text in texts if text]


def name_text(value: Any, column: str) -> str:
    """Return the file name in a cell, with numbers converted to text; "" if it is empty. Raise TableError for other types."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas stores integers with missing values as floats
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return str(value)
    return _cell_text(value, column, within_list=False)


def likely_cause(name: str, exists: Callable[[str], bool], casefolded: Container[str] = ()) -> str:
    """Return the likely reason why a name matches no file, with a hint; "" if none is apparent.

    `exists` returns whether a name matches; `casefolded` holds the known names after `str.casefold`.
    """
    slashed = name.replace("\\", "/")
    backslashes = "the paths have backslashes; write forward slashes" if slashed != name else ""
    if backslashes and exists(slashed):
        return backslashes
    parts = slashed.split("/")
    for start in range(1, len(parts)):
        rest = "/".join(parts[start:])
        if rest and (exists(rest) or rest.casefold() in casefolded):
            lead = "/".join(parts[:start]) + "/"
            return "; ".join(
                filter(
                    None,
                    [
                        backslashes,
                        f"the paths begin with {lead!r}, which is not below the folder; leave it out",
                    ],
                )
            )
    stem, dot, suffix = slashed.rpartition(".")
    other_case = dot and any(
        exists(f"{stem}.{cased}") for cased in {suffix.lower(), suffix.upper()} - {suffix}
    )
    if other_case or slashed.casefold() in casefolded:
        return "the names differ in upper and lower case"
    return backslashes


def unnamed_notes(table: str, column: str, lines: list[int]) -> Iterator[str]:
    """Yield a sentence on the rows without a file name, if there are any."""
    if lines:
        examples = ", ".join(map(str, lines[:_MAX_EXAMPLES])) + (
            ", ..." if len(lines) > _MAX_EXAMPLES else ""
        )
        yield (
            f"{_rows(len(lines))} of {table} without a value in column {column!r}, at line {examples}: their captions are unused."
        )


def unmatched_notes(table: str, names: Mapping[str, int], cause: Callable[[str], str]) -> Iterator[str]:
    """Yield a sentence for each cause of unmatched rows, with count, examples and reason. `names` maps names to row counts."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(cause(name), []).append(name)
    by_count = sorted(grouped.items(), key=lambda group: -len(group[1]))
    for reason, group in by_count[:_MAX_CAUSES]:
        examples = ", ".join(map(repr, group[:_MAX_EXAMPLES])) + (
            ", ..." if len(group) > _MAX_EXAMPLES else ""
        )
        count = sum(names[name] for name in group)
        yield f"{_rows(count)} of {table} without a matching image, such as {examples}" + (
            f": {reason}." if reason else "."
        )
    if rest := by_count[_MAX_CAUSES:]:
        count = sum(names[name] for _, group in rest for name in group)
        yield f"{_rows(count)} more of {table} without a matching image, for other causes."


def _cell_text(value: Any, column: str, within_list: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        text, status = decode_text(value)
        if status != OK:
            raise _not_text(column, "bytes that are not UTF-8 text", "Write the name of a text column.")
        return text.strip()
    if isinstance(value, str):
        return value.strip()
    kind, hint = type(value).__name__, "Write the name of a text column."
    if isinstance(value, bool):
        kind = "true or false"
    elif isinstance(value, int | float):
        kind, hint = f"numbers ({value})", "Write the name of a text column, or write the numbers as text."
    elif isinstance(value, dict):
        fields = ", ".join(map(str, value)) or "none"
        kind, hint = (
            f"objects (with the fields {fields})",
            "Write the name of a text column, or of a field within.",
        )
    elif isinstance(value, list | tuple):
        kind = "lists within lists" if within_list else "lists"
    raise _not_text(column, kind, hint)


def _not_text(column: str, kind: str, hint: str) -> TableError:
    return TableError(f"column {column!r} has {kind}, not text. {hint}")


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TableError(
            f"line {number} is not valid JSON: {error}. Correct it, or write the table again."
        ) from error


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
