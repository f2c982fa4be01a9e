"""Captions from the columns of a dataset repository's tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.table_rows import cell_texts
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.hub_files import where

_USUAL: Final = ("caption", "text")


def caption_columns(dataset: ImageDataset, columns: Sequence[str], table: str) -> tuple[str, ...]:
    """Which of a table's columns hold the captions: those that caption_column names, else `caption` or `text`; none if none are asked for.

    A dotted name is a field within a column. Raises SourceError when captions are asked for, and a column is missing.
    """
    if dataset.caption_strategy != "huggingface":
        return ()
    named = dataset.caption_column
    if named is None:
        usual = next((column for column in _USUAL if column in columns), None)
        if usual is None:
            raise SourceError(
                f"dataset {dataset.id!r} in multidatabackend.json: {table} of {dataset.dataset_name} has neither a column caption nor "
                f"text; it has {', '.join(columns)}. Name one of them in caption_column."
            )
        return (usual,)
    wanted = (named,) if isinstance(named, str) else named
    if missing := [column for column in wanted if column not in columns]:
        raise SourceError(
            f"{where(dataset, 'caption_column')}: {table} of {dataset.dataset_name} has no column {', '.join(missing)}; it has "
            f"{', '.join(columns)}. Name one of them in caption_column."
        )
    return wanted


def captions_of_row(row: Mapping[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    """Return the captions that a row has in these columns, each once; a list is several. Raises TableError for what is no text."""
    values = ((column, row.get(column) if column in row else _within(row, column)) for column in columns)
    return tuple(dict.fromkeys(text for column, value in values for text in cell_texts(value, column)))


def _within(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
