"""A dataset repository of Parquet files with a column of images, as `datasets` writes them."""

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.credentials import without_credentials
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.table_rows import TableError
from sdxl_pipeline.data.decoding.image_formats import HEAD_BYTES, suffix_of
from sdxl_pipeline.data.sources.download import DownloadCache, FetchError, Progress, fetch_all
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.data.sources.http_download import download
from sdxl_pipeline.data.sources.hub_captions import caption_columns, captions_of_row
from sdxl_pipeline.data.sources.hub_files import Content, HubRepository, download_file, where
from sdxl_pipeline.data.sources.remote_names import name_of_address, protocol_of

SHARDS: Final = "shards"
_ROWS_AT_ONCE: Final = 4
_BUFFER: Final = 1 << 20
"""Bytes of a column that are read ahead. What is in memory at a time is a page, at worst a row group: some 100 images as
`datasets` writes them, however many groups a file has."""


def build(
    dataset: ImageDataset,
    repository: HubRepository,
    local: Mapping[str, Path],
    folder: Path,
    cache: DownloadCache,
    on_progress: Progress | None,
) -> Content:
    """Write out the images in the Parquet files at `local`, by their path in the repository, and lay links to them into `folder`.

    What a file holds is written once, to a folder named after its content, beside `folder`. An image that is given as an address is
    downloaded, one given as a path is taken from the repository. Raises SourceError when a file cannot be read, or lacks a column.
    """
    tables = {path: _Table(dataset, path, cached) for path, cached in sorted(local.items())}
    total = sum(table.rows for table in tables.values())
    content = Content(total, {} if dataset.caption_strategy == "huggingface" else None)
    pointers: dict[str, str] = {}
    done = 0
    for path, table in tables.items():
        key = hashlib.sha256(f"{repository.files[path]}\0{dataset.image_column}".encode()).hexdigest()[:24]
        content.shards.add(key)
        shard = cache.folder / SHARDS / key
        if not shard.is_dir():
            content.written += _write_out(table, shard, cache, on_progress, done, total)
        done += table.rows
        stem = posixpath.splitext(path)[0]
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        (folder / stem).symlink_to(shard, target_is_directory=True)
        names = {int(file.stem): f"{stem}/{file.name}" for file in shard.iterdir()}
        if len(names) < table.rows:
            for row, pointer in table.pointers():
                if row not in names and not pointer:
                    content.failed[f"{stem}/{row:07d}"] = f"has no image in the column {dataset.image_column}"
                elif row not in names:
                    content.files -= pointer in pointers  # one image, however many rows have it
                    names[row] = pointers.setdefault(pointer, _name_of(pointer))
        if content.captions is not None:
            for row, texts in table.captions():
                if row in names and texts:
                    known = content.captions.get(names[row], ())
                    content.captions[names[row]] = tuple(dict.fromkeys((*known, *texts)))
    if pointers:
        _fetch_pointers(dataset, repository, pointers, folder, cache, content, on_progress)
    return content


class _Table:
    """One Parquet file: its images, the addresses in place of images, its captions."""

    def __init__(self, dataset: ImageDataset, path: str, cached: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.column, self._where = path, dataset.image_column, where(dataset)
        try:
            self._file = pq.ParquetFile(cached, buffer_size=_BUFFER, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise self._broken(error) from error
        schema = self._file.schema_arrow
        self.rows: int = self._file.metadata.num_rows
        columns = list(_columns(schema))
        if self.column not in schema.names:
            raise SourceError(
                f"{where(dataset, 'image_column')}: {path} of {dataset.dataset_name} has no such column; it has "
                f"{', '.join(schema.names)}. Name the column of the images in image_column."
            )
        kind = schema.field(self.column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        self._is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        self._fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if not (self._is_text or is_bytes or "bytes" in self._fields or "path" in self._fields):
            raise SourceError(
                f"{where(dataset, 'image_column')}: that column of {path} holds {kind}, and neither images nor addresses. It has the "
                f"columns {', '.join(schema.names)}; name that of the images in image_column."
            )
        self._caption_columns = caption_columns(dataset, columns, path)
        for column in self._caption_columns:  # before hours of writing images out
            if not _holds_text(found := _type_of(schema, column)):
                fields = (
                    f" Name a field within it, such as {column}.{found[0].name}."
                    if pa.types.is_struct(found)
                    else ""
                )
                raise SourceError(
                    f"{where(dataset, 'caption_column')}: column {column!r} of {path} holds {found}, not text.{fields} It has the columns "
                    f"{', '.join(schema.names)}; name one of text in caption_column."
                )

    def images(self) -> Iterator[tuple[int, bytes]]:
        """The rows that have an image, with its bytes."""
        if self._is_text or (self._fields and "bytes" not in self._fields):
            return
        for row, value in self._values(f"{self.column}.bytes" if self._fields else self.column):
            data = value.get("bytes") if isinstance(value, Mapping) else value
            if data:
                yield row, data

    def pointers(self) -> Iterator[tuple[int, str]]:
        """Every row, with the address or path that stands for its image; empty where there is none."""
        if not self._is_text and "path" not in self._fields:
            yield from ((row, "") for row in range(self.rows))
            return
        for row, value in self._values(f"{self.column}.path" if self._fields else self.column):
            yield row, str((value.get("path") if isinstance(value, Mapping) else value) or "")

    def captions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Every row's captions."""
        start = 0
        for batch in self._batches(1024, list(self._caption_columns)):
            for row, values in enumerate(batch.to_pylist(), start):
                try:
                    yield row, captions_of_row(values, self._caption_columns)
                except TableError as error:  # bytes that are no text
                    raise SourceError(f"{self._where}: {self.path}, row {row + 1}: {error}") from error
            start += batch.num_rows

    def _batches(self, rows: int, columns: list[str]) -> Iterator[Any]:
        import pyarrow as pa

        batches = self._file.iter_batches(rows, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise self._broken(error) from error
            if batch is None:
                return
            yield batch

    def _broken(self, error: Exception) -> SourceError:
        words = str(error).split("\n", 1)[0]
        return SourceError(
            f"{self._where}: {self.path} cannot be read as Parquet: {words}. Write another revision or split."
        )

    def _values(self, column: str) -> Iterator[tuple[int, Any]]:
        start = 0
        for batch in self._batches(_ROWS_AT_ONCE, [column]):
            yield from ((row, value.as_py()) for row, value in enumerate(batch.column(0), start))
            start += batch.num_rows


def _columns(schema: Any) -> Iterator[str]:
    """The names of columns, and dotted those of the fields within."""
    import pyarrow as pa

    for field in schema:
        yield field.name
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)


def _type_of(schema: Any, column: str) -> Any:
    """Return the type of a column, or of a field within one by its dotted name."""
    if column in schema.names:
        return schema.field(column).type
    first, *within = column.split(".")
    kind = schema.field(first).type
    for name in within:
        kind = kind.field(name).type
    return kind


def _holds_text(kind: Any) -> bool:
    """Return whether a column of this type may hold captions: text, UTF-8 bytes, or lists of them."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        inner = kind.value_type
        return not types.is_list(inner) and not types.is_large_list(inner) and _holds_text(inner)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)


def _write_out(
    table: _Table, shard: Path, cache: DownloadCache, on_progress: Progress | None, done: int, total: int
) -> int:
    """Write a table's images to a folder that is there when all of them are; how many there were."""
    count = 0
    with cache.incoming() as folder:
        folder.mkdir()
        for row, data in table.images():
            (folder / f"{row:07d}{suffix_of(data[:HEAD_BYTES])}").write_bytes(data)
            count += 1
            if on_progress is not None:
                on_progress(done + row + 1, total)
        shard.parent.mkdir(exist_ok=True)
        os.sync()  # once for all the images: a power cut, too, leaves the whole shard or none of it
        folder.replace(shard)
    return count


def _name_of(pointer: str) -> str:
    suffix = posixpath.splitext(pointer.split("?", 1)[0])[1].lower()
    return "linked/" + name_of_address(pointer, suffix if suffix[1:].isalnum() and len(suffix) < 7 else "")


def _fetch_pointers(
    dataset: ImageDataset,
    repository: HubRepository,
    pointers: Mapping[str, str],
    folder: Path,
    cache: DownloadCache,
    content: Content,
    on_progress: Progress | None,
) -> None:
    """Bring what addresses and paths stand for, and lay links to it into `folder`. What came before is not asked for again."""
    with DownloadCache(cache.folder / "linked").opened() as linked:
        found: dict[str, Path] = {}

        def job(pointer: str, name: str) -> int:
            if protocol_of(pointer) in ("http", "https"):
                with linked.incoming() as temporary:
                    download(pointer, temporary, dataset.allow_private_addresses)
                    return linked.put(temporary, name, name)
            path = posixpath.normpath(pointer)
            if path not in repository.files:
                raise FetchError("the repository has no such file")
            found[pointer] = download_file(repository, path)
            return 0

        missing = {pointer: name for pointer, name in pointers.items() if not linked.holds(name, name)}
        jobs = {pointer: partial(job, pointer, name) for pointer, name in missing.items()}
        received, failed = fetch_all(jobs, on_progress, len(pointers) - len(jobs), len(pointers))
        linked.keep_only(set(pointers.values()))
        for pointer, name in pointers.items():
            if pointer not in failed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(found.get(pointer, linked.files / name))
            elif content.captions is not None:
                content.captions.pop(name, None)
    content.written += len(missing) - len(failed)
    content.received += received
    content.failed |= {
        without_credentials(pointer): f"download failed: {reason}" for pointer, reason in failed.items()
    }
