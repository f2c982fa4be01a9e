"""Captions from columns of a dataset repository's tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.table_rows import cell_texts
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.hub_files import where

_DEFAULT_COLUMNS: Final = ("caption", "text")


def caption_columns(dataset: ImageDataset, columns: Sequence[str], table: str) -> tuple[str, ...]:
    """Return the caption columns of a table: those in caption_column, else `caption` or `text`; none for other caption strategies.

    A dotted name is a field within a column. Raises SourceError if a required column is missing.
    """
    if dataset.caption_strategy != "huggingface":
        return ()
    caption_column = dataset.caption_column
    if caption_column is None:
        default_column = next((column for column in _DEFAULT_COLUMNS if column in columns), None)
        if default_column is None:
            raise SourceError(
                f"dataset {dataset.id!r} in multidatabackend.json: {table} of {dataset.dataset_name} has neither a column caption nor "
                f"text; it has {', '.join(columns)}. Write one of them in caption_column."
            )
        return (default_column,)
    required = (caption_column,) if isinstance(caption_column, str) else caption_column
    if missing := [column for column in required if column not in columns]:
        raise SourceError(
            f"{where(dataset, 'caption_column')}: {table} of {dataset.dataset_name} has no column {', '.join(missing)}; it has "
            f"{', '.join(columns)}. Write one of them in caption_column."
        )
    return required


def captions_of_row(row: Mapping[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct captions of a row in these columns; a list is several. Raise TableError for values that are not text."""
    values = (
        (column, row.get(column) if column in row else _nested_value(row, column)) for column in columns
    )
    return tuple(dict.fromkeys(text for column, value in values for text in cell_texts(value, column)))


def _nested_value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
