"""Captions from a table by file name: Parquet, or JSON Lines."""

import json
import math
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdxl_pipeline.images.caption_errors import CaptionError
from sdxl_pipeline.images.text_files import OK, decode_text
from sdxl_pipeline.project.datasets import ImageDataset, ParquetTable

AMBIGUOUS = "ambiguous"
MISSING = "missing"


def table_path(dataset: ImageDataset, folder: Path) -> Path | None:
    """Where the caption table of a dataset lies whose captions are read from one; None for any other."""
    if dataset.caption_strategy != "parquet" or dataset.parquet is None:
        return None
    return folder / Path(dataset.parquet.path).expanduser()


def captions_from_table(
    dataset: ImageDataset, folder: Path, pictures: Iterable[str]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """The captions of each of `pictures` (paths relative to `folder`), and "ok", "missing" or "ambiguous".

    A row belongs to the picture whose path it names, relative to the folder or absolute; or, as a bare name, to the one picture of
    that name wherever it lies. With `identifier_includes_extension` names carry their extension; without it they need not. Numbers
    name files as they are written. Several rows of one picture are several captions. A bare name of several pictures belongs to
    none of them, unless one lies in the folder itself.

    Raises CaptionError when the table cannot be read or lacks a column.
    """
    settings, path = dataset.parquet, table_path(dataset, folder)
    if settings is None or path is None:
        raise AssertionError("only a dataset of strategy parquet has a table")
    where = f"dataset {dataset.id!r} in multidatabackend.json: parquet.path {settings.path!r}"
    table = _by_name(_read_rows(path, settings, where), settings, folder)
    pictures = list(pictures)
    bare = Counter(
        name for picture in pictures for name in set(_names(posixpath.basename(picture), settings))
    )
    return {picture: _look_up(picture, table, bare, settings) for picture in pictures}


def _look_up(
    picture: str, table: Mapping[str, list[str]], bare: Counter[str], settings: ParquetTable
) -> tuple[tuple[str, ...], str]:
    for name in _names(picture, settings):
        if name in table:
            return tuple(table[name]), OK
    for name in _names(posixpath.basename(picture), settings):
        if name in table:
            return ((), AMBIGUOUS) if bare[name] > 1 else (tuple(table[name]), OK)
    return (), MISSING


def _names(path: str, settings: ParquetTable) -> tuple[str, ...]:
    """What the table may call a picture."""
    path = unicodedata.normalize("NFC", path)
    return (path,) if settings.identifier_includes_extension else (posixpath.splitext(path)[0], path)


def _by_name(rows: Iterable[Mapping[str, Any]], settings: ParquetTable, folder: Path) -> dict[str, list[str]]:
    columns = _caption_columns(settings)
    root = str(folder) + "/"
    table: dict[str, list[str]] = {}
    for row in rows:
        name = _text(row.get(settings.filename_column))
        if not name:
            continue
        name = unicodedata.normalize("NFC", name.removeprefix(root).removeprefix("./"))
        texts = [text for column in columns for text in _texts(row.get(column))]
        if not texts and settings.fallback_caption_column:
            texts = _texts(row.get(settings.fallback_caption_column))
        known = table.setdefault(name, [])
        known += [text for text in dict.fromkeys(texts) if text not in known]
    return table


def _caption_columns(settings: ParquetTable) -> tuple[str, ...]:
    named = settings.caption_column
    return (named,) if isinstance(named, str) else named


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # a column of whole numbers with gaps is one of floats
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [text for item in values if (text := _text(item).strip())]


def _read_rows(path: Path, settings: ParquetTable, where: str) -> Iterator[Mapping[str, Any]]:
    needed = [settings.filename_column, *_caption_columns(settings)]
    if settings.fallback_caption_column:
        needed.append(settings.fallback_caption_column)
    if not path.is_file():
        raise CaptionError(
            f"{where}: there is no file {path}. Write the table's path, relative to the pictures' folder or absolute."
        )
    rows = _json_rows(path, where) if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else None
    if rows is None:
        columns, rows = _parquet_rows(path, needed, where)
    else:
        columns = list(dict.fromkeys(column for row in rows for column in row))
    missing = [column for column in needed if column not in columns]
    if missing:
        raise CaptionError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}. "
            "Name its columns in parquet.filename_column and parquet.caption_column."
        )
    yield from rows


def _parquet_rows(path: Path, needed: list[str], where: str) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            present = [column for column in dict.fromkeys(needed) if column in columns]
            return columns, file.read(columns=present).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CaptionError(
            f"{where} cannot be read as Parquet: {str(error).splitlines()[0]} "
            "Write the path of a .parquet file, or of a .jsonl file with an object per line."
        ) from error


def _json_rows(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        text, status = decode_text(path.read_bytes())
    except OSError as error:
        raise CaptionError(
            f"{where} cannot be read: {error.strerror}. Give this user the right to read it."
        ) from error
    if status != OK:
        raise CaptionError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    if text.lstrip().startswith("["):
        rows = _parse(text, f"{where} is no JSON list")
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [
            _parse(line, f"{where}, line {number}, is no JSON object")
            for number, line in lines
            if line.strip()
        ]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise CaptionError(
                f'{where}: entry {number} is no object. Write {{"filename": "a.png", "caption": "..."}}.'
            )
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CaptionError(f"{where}: {error}. Mend it, or write the table again.") from error
