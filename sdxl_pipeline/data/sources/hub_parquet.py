"""Dataset repositories of Parquet files with an image column, as written by `datasets`."""

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
from sdxl_pipeline.data.sources.remote_names import name_for_url, protocol_of

SHARDS: Final = "shards"
_ROWS_PER_BATCH: Final = 4
_READ_BUFFER_BYTES: Final = 1 << 20
"""Read-ahead of a column. A page is in memory at a time, at worst a row group: about 100 images as written by `datasets`, independent of
the number of groups in a file."""


def build_content(
    dataset: ImageDataset,
    repository: HubRepository,
    local: Mapping[str, Path],
    folder: Path,
    cache: DownloadCache,
    on_progress: Progress | None,
) -> Content:
    """Return the content of `folder` after extracting the images of the Parquet files in `local`, by repository path, and linking them.

    Each file is extracted once, to a folder named after its content. An image given as a URL is downloaded; one given as a path is read
    from the repository. Raises SourceError if a file cannot be read or lacks a column.
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
            content.written += _extract_images(table, shard, cache, on_progress, done, total)
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
                    content.files -= pointer in pointers  # several rows may have one image
                    names[row] = pointers.setdefault(pointer, _file_name_for(pointer))
        if content.captions is not None:
            for row, texts in table.captions():
                if row in names and texts:
                    known = content.captions.get(names[row], ())
                    content.captions[names[row]] = tuple(dict.fromkeys((*known, *texts)))
    if pointers:
        _fetch_pointers(dataset, repository, pointers, folder, cache, content, on_progress)
    return content


class _Table:
    """One Parquet file with images, pointers (URLs or paths) to images, and captions."""

    def __init__(self, dataset: ImageDataset, path: str, cached: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.column, self._where = path, dataset.image_column, where(dataset)
        try:
            self._file = pq.ParquetFile(cached, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise self._broken(error) from error
        schema = self._file.schema_arrow
        self.rows: int = self._file.metadata.num_rows
        columns = list(_columns(schema))
        if self.column not in schema.names:
            raise SourceError(
                f"{where(dataset, 'image_column')}: {path} of {dataset.dataset_name} has no such column; it has "
                f"{', '.join(schema.names)}. Write the column of the images in image_column."
            )
        kind = schema.field(self.column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        self._is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        self._fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if not (self._is_text or is_bytes or "bytes" in self._fields or "path" in self._fields):
            raise SourceError(
                f"{where(dataset, 'image_column')}: that column of {path} has {kind}, neither images nor URLs. The file has the "
                f"columns {', '.join(schema.names)}; write that of the images in image_column."
            )
        self._caption_columns = caption_columns(dataset, columns, path)
        for column in self._caption_columns:  # before hours of extracting images
            if not _is_text_type(column_type := _type_of(schema, column)):
                fields = (
                    f" Write a field within it, such as {column}.{column_type[0].name}."
                    if pa.types.is_struct(column_type)
                    else ""
                )
                raise SourceError(
                    f"{where(dataset, 'caption_column')}: column {column!r} of {path} has {column_type}, not text.{fields} The file has the "
                    f"columns {', '.join(schema.names)}; write a text column in caption_column."
                )

    def images(self) -> Iterator[tuple[int, bytes]]:
        """Yield (row, bytes) of each row with an image."""
        if self._is_text or (self._fields and "bytes" not in self._fields):
            return
        for row, value in self._values(f"{self.column}.bytes" if self._fields else self.column):
            data = value.get("bytes") if isinstance(value, Mapping) else value
            if data:
                yield row, data

    def pointers(self) -> Iterator[tuple[int, str]]:
        """Yield (row, URL or path of its image) of every row; "" if it has none."""
        if not self._is_text and "path" not in self._fields:
            yield from ((row, "") for row in range(self.rows))
            return
        for row, value in self._values(f"{self.column}.path" if self._fields else self.column):
            yield row, str((value.get("path") if isinstance(value, Mapping) else value) or "")

    def captions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield (row, captions) of every row."""
        start = 0
        for batch in self._batches(1024, list(self._caption_columns)):
            for row, values in enumerate(batch.to_pylist(), start):
                try:
                    yield row, captions_of_row(values, self._caption_columns)
                except TableError as error:  # bytes that are not text
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
        message = str(error).split("\n", 1)[0]
        return SourceError(
            f"{self._where}: {self.path} cannot be read as Parquet: {message}. Write another revision or split."
        )

    def _values(self, column: str) -> Iterator[tuple[int, Any]]:
        start = 0
        for batch in self._batches(_ROWS_PER_BATCH, [column]):
            yield from ((row, value.as_py()) for row, value in enumerate(batch.column(0), start))
            start += batch.num_rows


def _columns(schema: Any) -> Iterator[str]:
    """Yield the names of columns, and the dotted names of fields within."""
    import pyarrow as pa

    for field in schema:
        yield field.name
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)


def _type_of(schema: Any, column: str) -> Any:
    """Return the type of a column, or of a field within one by its dotted name."""
    if column in schema.names:
        return schema.field(column).type
    first, *nested_fields = column.split(".")
    kind = schema.field(first).type
    for name in nested_fields:
        kind = kind.field(name).type
    return kind


def _is_text_type(kind: Any) -> bool:
    """Return whether a column of this type may have captions: text, UTF-8 bytes, or lists of them."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        inner = kind.value_type
        return not types.is_list(inner) and not types.is_large_list(inner) and _is_text_type(inner)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)


def _extract_images(
    table: _Table, shard: Path, cache: DownloadCache, on_progress: Progress | None, done: int, total: int
) -> int:
    """Write a table's images to the folder `shard`, which appears when it is complete; return their number."""
    count = 0
    with cache.temporary_path() as folder:
        folder.mkdir()
        for row, data in table.images():
            (folder / f"{row:07d}{suffix_of(data[:HEAD_BYTES])}").write_bytes(data)
            count += 1
            if on_progress is not None:
                on_progress(done + row + 1, total)
        shard.parent.mkdir(exist_ok=True)
        os.sync()  # once for all images, so that a power failure leaves a complete shard or none
        folder.replace(shard)
    return count


def _file_name_for(pointer: str) -> str:
    suffix = posixpath.splitext(pointer.split("?", 1)[0])[1].lower()
    return "linked/" + name_for_url(pointer, suffix if suffix[1:].isalnum() and len(suffix) < 7 else "")


def _fetch_pointers(
    dataset: ImageDataset,
    repository: HubRepository,
    pointers: Mapping[str, str],
    folder: Path,
    cache: DownloadCache,
    content: Content,
    on_progress: Progress | None,
) -> None:
    """Download the images of URLs and paths that are not in the cache, and link them into `folder`."""
    with DownloadCache(cache.folder / "linked").locked() as linked:
        downloaded: dict[str, Path] = {}

        def job(pointer: str, name: str) -> int:
            if protocol_of(pointer) in ("http", "https"):
                with linked.temporary_path() as temporary:
                    download(pointer, temporary, dataset.allow_private_addresses)
                    return linked.add(temporary, name, name)
            path = posixpath.normpath(pointer)
            if path not in repository.files:
                raise FetchError("the repository has no such file")
            downloaded[pointer] = download_file(repository, path)
            return 0

        missing = {pointer: name for pointer, name in pointers.items() if not linked.contains(name, name)}
        jobs = {pointer: partial(job, pointer, name) for pointer, name in missing.items()}
        received, failed = fetch_all(jobs, on_progress, len(pointers) - len(jobs), len(pointers))
        linked.retain(set(pointers.values()))
        for pointer, name in pointers.items():
            if pointer not in failed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(downloaded.get(pointer, linked.files / name))
            elif content.captions is not None:
                content.captions.pop(name, None)
    content.written += len(missing) - len(failed)
    content.received += received
    content.failed |= {
        without_credentials(pointer): f"download failed: {reason}" for pointer, reason in failed.items()
    }
