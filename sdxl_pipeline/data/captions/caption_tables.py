"""Captions from a table with file names: Parquet or JSON Lines."""

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
    """Return the path of a dataset's caption table; None if its captions are not read from one."""
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

    A row belongs to the image whose path it has, relative to the folder or absolute; or, if it has a file name without folder, to the
    only image of that name in any folder. With `identifier_includes_extension` names include their extension; without it that is
    optional. Numbers are converted to text. Several rows of one image are several captions. A file name without folder that several
    images share belongs to none of them, unless one is in `folder` itself.

    `on_note` gets a sentence for the rows without a file name, and one for each cause by which rows match neither an image nor one
    of `others`, the files that are not trained on. Raises CaptionError if the table cannot be read, lacks a column, or has captions
    or names that are not text.
    """
    settings, path = dataset.parquet, table_path(dataset, folder)
    if settings is None or path is None:
        raise AssertionError("only a dataset of strategy parquet has a table")
    where = f"dataset {dataset.id!r} in multidatabackend.json: parquet.path {settings.path!r}"
    try:
        captions_by_name, row_counts, lines_without_name = _captions_by_name(
            _read_rows(path, settings, where), settings, folder
        )
    except TableError as error:
        raise CaptionError(f"{where}: {error}") from error
    images = list(images)
    bare_name_counts = Counter(
        name for image in images for name in set(_names_of(posixpath.basename(image), settings))
    )
    found = {image: _captions_for(image, captions_by_name, bare_name_counts, settings) for image in images}
    if on_note is not None:
        for note in _unused_row_notes(settings, row_counts, lines_without_name, [*images, *others]):
            on_note(note)
    return found


def _unused_row_notes(
    settings: ParquetTable, row_counts: Mapping[str, int], lines_without_name: list[int], files: Iterable[str]
) -> Iterator[str]:
    """Yield a note for each kind of row that gives no image a caption."""
    yield from unnamed_notes(settings.path, settings.filename_column, lines_without_name)
    known_names = {
        name
        for file in files
        for path in (file, posixpath.basename(file))
        for name in _names_of(path, settings)
    }
    unmatched = {name: count for name, count in row_counts.items() if name not in known_names}
    if unmatched:
        casefolded = frozenset(name.casefold() for name in known_names)
        cause = partial(likely_cause, exists=known_names.__contains__, casefolded=casefolded)
        yield from unmatched_notes(settings.path, unmatched, cause)


def _captions_for(
    image: str,
    captions_by_name: Mapping[str, list[str]],
    bare_name_counts: Counter[str],
    settings: ParquetTable,
) -> tuple[tuple[str, ...], str]:
    for name in _names_of(image, settings):
        if name in captions_by_name:
            return tuple(captions_by_name[name]), OK
    for name in _names_of(posixpath.basename(image), settings):
        if name in captions_by_name:
            return ((), AMBIGUOUS) if bare_name_counts[name] > 1 else (tuple(captions_by_name[name]), OK)
    return (), MISSING


def _names_of(path: str, settings: ParquetTable) -> tuple[str, ...]:
    """Return the names under which the table may have an image."""
    path = unicodedata.normalize("NFC", path)
    return (path,) if settings.identifier_includes_extension else (posixpath.splitext(path)[0], path)


def _captions_by_name(
    rows: Iterable[Row], settings: ParquetTable, folder: Path
) -> tuple[dict[str, list[str]], Counter[str], list[int]]:
    """Return the captions by name, the number of rows of each name, and the lines of rows without a name."""
    columns = _caption_columns(settings)
    root = str(folder) + "/"
    captions_by_name: dict[str, list[str]] = {}
    row_counts: Counter[str] = Counter()
    lines_without_name: list[int] = []
    for line, row in rows:
        try:
            name = name_text(row.get(settings.filename_column), settings.filename_column)
            texts = [text for column in columns for text in cell_texts(row.get(column), column)]
            if not texts and (fallback := settings.fallback_caption_column):
                texts = cell_texts(row.get(fallback), fallback)
        except TableError as error:
            raise TableError(f"row {line}: {error}") from error
        if not name:
            lines_without_name.append(line)
            continue
        name = unicodedata.normalize("NFC", name.removeprefix(root).removeprefix("./"))
        row_counts[name] += 1
        name_captions = captions_by_name.setdefault(name, [])
        name_captions += [text for text in dict.fromkeys(texts) if text not in name_captions]
    return captions_by_name, row_counts, lines_without_name


def _caption_columns(settings: ParquetTable) -> tuple[str, ...]:
    columns = settings.caption_column
    return (columns,) if isinstance(columns, str) else columns


def _read_rows(path: Path, settings: ParquetTable, where: str) -> Iterator[Row]:
    required = [settings.filename_column, *_caption_columns(settings)]
    if settings.fallback_caption_column:
        required.append(settings.fallback_caption_column)
    if not path.is_file():
        raise CaptionError(
            f"{where}: file {path} does not exist. Write the table's path, relative to the images' folder or absolute."
        )
    rows = _json_rows(path, where) if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else None
    if rows is None:
        columns, rows = _parquet_rows(path, required, where)
    else:
        columns = list(dict.fromkeys(column for _, row in rows for column in row))
    missing = [column for column in required if column not in columns]
    if missing:
        raise CaptionError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}. "
            "Write its columns in parquet.filename_column and parquet.caption_column."
        )
    yield from rows


def _parquet_rows(path: Path, required: list[str], where: str) -> tuple[list[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            present = [column for column in dict.fromkeys(required) if column in columns]
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
            f"{where} cannot be read: {error.strerror}. Give this user read permission."
        ) from error
    if status != OK:
        raise CaptionError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    return list(json_rows(text))
