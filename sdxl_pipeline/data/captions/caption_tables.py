"""Captions from a table by file name: Parquet, or JSON Lines."""

import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from sdxl_pipeline.config.schema.datasets import ImageDataset, ParquetTable
from sdxl_pipeline.data.captions.table_rows import (
    Row,
    TableError,
    cell_texts,
    json_rows,
    likely_cause,
    name_text,
    unmatched_notes,
    unnamed_notes,
)
from sdxl_pipeline.data.captions.text_files import OK, CaptionError, decode_text

AMBIGUOUS = "ambiguous"
MISSING = "missing"


def table_path(dataset: ImageDataset, folder: Path) -> Path | None:
    """Where the caption table of a dataset lies whose captions are read from one; None for any other."""
    if dataset.caption_strategy != "parquet" or dataset.parquet is None:
        return None
    return folder / Path(dataset.parquet.path).expanduser()


def captions_from_table(
    dataset: ImageDataset,
    folder: Path,
    images: Iterable[str],
    others: Iterable[str] = (),
    on_note: Callable[[str], None] | None = None,
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the captions of each of `images` (paths relative to `folder`), and "ok", "missing" or "ambiguous".

    A row belongs to the image whose path it names, relative to the folder or absolute; or, as a bare name, to the one image of that
    name in any folder. With `identifier_includes_extension` names carry their extension; without it they need not. Numbers name
    files as they are written. Several rows of one image are several captions. A bare name of several images belongs to none of
    them, unless one is in the folder itself.

    `on_note` gets a sentence on the rows that name no file, and one for each cause by which rows match neither an image nor one of
    `others`, the files that are not trained on. Raises CaptionError when the table cannot be read, lacks a column, or has captions
    or names that are no text.
    """
    settings, path = dataset.parquet, table_path(dataset, folder)
    if settings is None or path is None:
        raise AssertionError("only a dataset of strategy parquet has a table")
    where = f"dataset {dataset.id!r} in multidatabackend.json: parquet.path {settings.path!r}"
    try:
        table, counts, unnamed = _by_name(_read_rows(path, settings, where), settings, folder)
    except TableError as error:
        raise CaptionError(f"{where}: {error}") from error
    images = list(images)
    bare = Counter(name for image in images for name in set(_names(posixpath.basename(image), settings)))
    found = {image: _look_up(image, table, bare, settings) for image in images}
    if on_note is not None:
        for note in _notes(settings, counts, unnamed, [*images, *others]):
            on_note(note)
    return found


def _notes(
    settings: ParquetTable, counts: Mapping[str, int], unnamed: list[int], files: Iterable[str]
) -> Iterator[str]:
    """Yield what to report of rows that give no image a caption."""
    yield from unnamed_notes(settings.path, settings.filename_column, unnamed)
    known = {
        name for file in files for path in (file, posixpath.basename(file)) for name in _names(path, settings)
    }
    unmatched = {name: count for name, count in counts.items() if name not in known}
    if unmatched:
        folded = frozenset(name.casefold() for name in known)
        cause = partial(likely_cause, exists=known.__contains__, folded=folded)
        yield from unmatched_notes(settings.path, unmatched, cause)


def _look_up(
    image: str, table: Mapping[str, list[str]], bare: Counter[str], settings: ParquetTable
) -> tuple[tuple[str, ...], str]:
    for name in _names(image, settings):
        if name in table:
            return tuple(table[name]), OK
    for name in _names(posixpath.basename(image), settings):
        if name in table:
            return ((), AMBIGUOUS) if bare[name] > 1 else (tuple(table[name]), OK)
    return (), MISSING


def _names(path: str, settings: ParquetTable) -> tuple[str, ...]:
    """What the table may call an image."""
    path = unicodedata.normalize("NFC", path)
    return (path,) if settings.identifier_includes_extension else (posixpath.splitext(path)[0], path)


def _by_name(
    rows: Iterable[Row], settings: ParquetTable, folder: Path
) -> tuple[dict[str, list[str]], Counter[str], list[int]]:
    """Return the captions by name, the number of rows of each name, and the lines of the rows without one."""
    columns = _caption_columns(settings)
    root = str(folder) + "/"
    table: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    unnamed: list[int] = []
    for line, row in rows:
        try:
            name = name_text(row.get(settings.filename_column), settings.filename_column)
            texts = [text for column in columns for text in cell_texts(row.get(column), column)]
            if not texts and (fallback := settings.fallback_caption_column):
                texts = cell_texts(row.get(fallback), fallback)
        except TableError as error:
            raise TableError(f"row {line}: {error}") from error
        if not name:
            unnamed.append(line)
            continue
        name = unicodedata.normalize("NFC", name.removeprefix(root).removeprefix("./"))
        counts[name] += 1
        known = table.setdefault(name, [])
        known += [text for text in dict.fromkeys(texts) if text not in known]
    return table, counts, unnamed


def _caption_columns(settings: ParquetTable) -> tuple[str, ...]:
    named = settings.caption_column
    return (named,) if isinstance(named, str) else named


def _read_rows(path: Path, settings: ParquetTable, where: str) -> Iterator[Row]:
    needed = [settings.filename_column, *_caption_columns(settings)]
    if settings.fallback_caption_column:
        needed.append(settings.fallback_caption_column)
    if not path.is_file():
        raise CaptionError(
            f"{where}: there is no file {path}. Write the table's path, relative to the images' folder or absolute."
        )
    rows = _json_rows(path, where) if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else None
    if rows is None:
        columns, rows = _parquet_rows(path, needed, where)
    else:
        columns = list(dict.fromkeys(column for _, row in rows for column in row))
    missing = [column for column in needed if column not in columns]
    if missing:
        raise CaptionError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}. "
            "Name its columns in parquet.filename_column and parquet.caption_column."
        )
    yield from rows


def _parquet_rows(path: Path, needed: list[str], where: str) -> tuple[list[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            present = [column for column in dict.fromkeys(needed) if column in columns]
            return columns, list(enumerate(file.read(columns=present).to_pylist(), start=1))
    except (OSError, pa.ArrowException) as error:
        raise CaptionError(
            f"{where} cannot be read as Parquet: {str(error).splitlines()[0]} "
            "Write the path of a .parquet file, or of a .jsonl file with an object per line."
        ) from error


def _json_rows(path: Path, where: str) -> list[Row]:
    try:
        text, status = decode_text(path.read_bytes())
    except OSError as error:
        raise CaptionError(
            f"{where} cannot be read: {error.strerror}. Give this user the right to read it."
        ) from error
    if status != OK:
        raise CaptionError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    return list(json_rows(text))
