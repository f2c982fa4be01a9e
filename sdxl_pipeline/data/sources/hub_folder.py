"""Dataset repositories that are image folders, with metadata tables or text files for captions."""

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.caption_rules import captions_in
from sdxl_pipeline.data.captions.table_rows import (
    Row,
    TableError,
    csv_rows,
    json_rows,
    likely_cause,
    name_text,
    unmatched_notes,
    unnamed_notes,
)
from sdxl_pipeline.data.captions.text_files import OK, decode_text
from sdxl_pipeline.data.decoding.image_formats import IMAGE_SUFFIXES
from sdxl_pipeline.data.scan.file_listing import CAPTION_SUFFIXES, classify_files
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.hub_captions import caption_columns, captions_of_row
from sdxl_pipeline.data.sources.hub_files import Content, HubRepository
from sdxl_pipeline.data.sources.remote_names import invalid_name_reason

_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NAME_COLUMN: Final = "file_name"


def required_files(repository: HubRepository, files: Iterable[str]) -> list[str]:
    """Return the files to download for a split: its images, their text files, and the metadata tables in their parent folders."""
    files = list(files)
    images = [path for path in files if is_image(path)]
    stems = {posixpath.splitext(path)[0] for path in images}
    texts = [
        path
        for path in files
        if PurePosixPath(path).suffix.lower() in CAPTION_SUFFIXES and posixpath.splitext(path)[0] in stems
    ]
    folders = {str(folder) for path in images for folder in PurePosixPath(path).parents}
    tables = [
        path
        for path in repository.files
        if posixpath.basename(path) in _METADATA and (posixpath.dirname(path) or ".") in folders
    ]
    return sorted({*images, *texts, *tables})


def is_image(path: str) -> bool:
    """Return whether a file is an image by its suffix."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def build_content(
    dataset: ImageDataset, repository: HubRepository, local: Mapping[str, Path], folder: Path
) -> Content:
    """Return the content of `folder` after linking the files in `local`, by repository path, into it and reading their captions.

    Raises SourceError if the captions cannot be read.
    """
    failed: dict[str, str] = {}
    linked: list[str] = []
    for path, cached in local.items():
        if posixpath.basename(path) in _METADATA:
            continue
        if reason := invalid_name_reason(path):
            failed[path] = f"cannot be stored as a file: {reason}"
            continue
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cached)
        linked.append(path)
    images = [path for path in linked if is_image(path)]
    content = Content(len(images), None, failed)
    if dataset.caption_strategy == "huggingface":
        content.captions = _captions(dataset, repository, local, images, content.notes)
    return content


def _captions(
    dataset: ImageDataset,
    repository: HubRepository,
    local: Mapping[str, Path],
    images: list[str],
    notes: list[str],
) -> dict[str, tuple[str, ...]]:
    tables = [path for path in local if posixpath.basename(path) in _METADATA]
    if not tables:
        return _captions_from_text_files(dataset, local, images)
    captions: dict[str, tuple[str, ...]] = {}
    for table in tables:
        rows = list(_rows(dataset, table, local[table]))
        columns_found = list(dict.fromkeys(column for _, row in rows for column in row if column))
        if _NAME_COLUMN not in columns_found:
            raise SourceError(
                f"dataset {dataset.id!r} in multidatabackend.json: {table} of {dataset.dataset_name} has no column {_NAME_COLUMN}, so "
                f"its rows match no image; it has {', '.join(columns_found) or 'none'}. Write another caption_strategy, or another dataset."
            )
        columns = caption_columns(dataset, columns_found, table)
        unnamed: list[int] = []
        unmatched: Counter[str] = Counter()
        table_folder = posixpath.dirname(table)

        def is_file(name: str, table_folder: str = table_folder) -> bool:
            return posixpath.normpath(posixpath.join(table_folder, name)) in repository.files

        for line, row in rows:
            try:
                name = name_text(row.get(_NAME_COLUMN), _NAME_COLUMN)
                texts = captions_of_row(row, columns)
            except TableError as error:
                raise SourceError(
                    f"dataset {dataset.id!r} in multidatabackend.json: {table} of {dataset.dataset_name}, row {line}: {error}"
                ) from error
            if not name:
                unnamed.append(line)
            elif not is_file(name):
                unmatched[name] += 1
            elif texts:
                path = posixpath.normpath(posixpath.join(table_folder, name))
                captions[path] = tuple(dict.fromkeys((*captions.get(path, ()), *texts)))
        notes += unnamed_notes(table, _NAME_COLUMN, unnamed)
        notes += unmatched_notes(table, unmatched, partial(likely_cause, exists=is_file))
    return captions


def _captions_from_text_files(
    dataset: ImageDataset, local: Mapping[str, Path], images: list[str]
) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    paths = sorted(local)
    file_types = classify_files(paths, [""] * len(paths))
    text_path_of = {paths[image]: paths[text] for image, text in file_types.caption_files.items()}
    for path in images:
        text_path = text_path_of.get(path)
        text, status = decode_text(local[text_path].read_bytes()) if text_path else ("", "")
        if status == OK:
            captions[path] = tuple(filter(None, captions_in(text, dataset.disable_multiline_split)))
    if not text_path_of:
        raise SourceError(
            f"dataset {dataset.id!r} in multidatabackend.json: {dataset.dataset_name} has neither {', '.join(_METADATA)} nor text files "
            'beside its images, so there are no captions. Write "caption_strategy": "filename" or "instanceprompt".'
        )
    return captions


def _rows(dataset: ImageDataset, table: str, path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if table.endswith(".parquet"):
            yield from enumerate(pq.read_table(path).to_pylist(), start=1)
            return
        text, status = decode_text(path.read_bytes())
        if status != OK:
            raise TableError("the file is neither UTF-8 nor UTF-16 with a byte order mark.")
        yield from csv_rows(text) if table.endswith(".csv") else json_rows(text)
    except (TableError, pa.ArrowException) as error:
        raise SourceError(
            f"dataset {dataset.id!r} in multidatabackend.json: {table} of {dataset.dataset_name} cannot be read: {error} "
            'Or write "caption_strategy": "filename" or "instanceprompt", or another revision.'
        ) from error
