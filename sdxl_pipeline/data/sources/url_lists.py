"""Images from a CSV list of URLs or paths with captions."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from sdxl_pipeline.config.credentials import without_credentials
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.table_rows import TableError, csv_rows, likely_cause, unnamed_notes
from sdxl_pipeline.data.captions.text_files import OK, decode_text
from sdxl_pipeline.data.decoding.image_formats import HEAD_BYTES, suffix_of
from sdxl_pipeline.data.sources.download import DownloadCache, FetchError, Progress, fetch_all
from sdxl_pipeline.data.sources.fetch_result import FetchResult, SourceError
from sdxl_pipeline.data.sources.http_download import download
from sdxl_pipeline.data.sources.object_store import fetch_remote, open_file
from sdxl_pipeline.data.sources.remote_names import STORES, name_for_url, protocol_of
from sdxl_pipeline.files.atomic_files import sha256_file

_DELIMITERS: Final = ",;\t|"


def fetch_list(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> FetchResult:
    """Download the images of the list into `folder`/files; paths, relative to the list's folder, become links to the files.

    Cached files are not downloaded again, and files that are no longer in the list are removed. Raises SourceError if the list cannot
    be read or lacks a column.
    """
    image_list = read_list(dataset)
    captions_by_url = image_list.captions
    with DownloadCache(folder).locked() as cache:
        cached = {str(stamp): name for name, stamp in cache.stamps.items() if cache.contains(name, stamp)}
        names, failed, jobs = {}, {}, {}
        for url in captions_by_url:
            if protocol_of(url) in ("", "file"):
                if (path := local_file(dataset, url)) is not None:
                    names[url] = name_for_url(url, _suffix_of(path.as_uri()))
                    cache.link(path, names[url])
                else:
                    cause = likely_cause(url, lambda name: local_file(dataset, name) is not None)
                    failed[url] = "the file does not exist" + (f": {cause}" if cause else "")
                continue
            identity = name_for_url(url, "")  # a URL may be signed, so it is not part of the manifest
            if identity in cached:
                names[url] = cached[identity]
            else:
                jobs[url] = _download_job(dataset, cache, url, identity, names)
        received, download_failures = fetch_all(
            jobs, on_progress, len(captions_by_url) - len(jobs), len(captions_by_url)
        )
        cache.retain(set(names.values()))
    failed |= {url: f"download failed: {reason}" for url, reason in download_failures.items()}
    return FetchResult(
        cache.files,
        captions={names[url]: texts for url, texts in captions_by_url.items() if url in names and texts},
        revision=image_list.revision,
        files=len(captions_by_url),
        downloaded=len(jobs) - len(download_failures),
        downloaded_bytes=received,
        failed=tuple(sorted((without_credentials(url), reason) for url, reason in failed.items())),
        notes=image_list.notes,
    )


class ImageList(NamedTuple):
    """Content of a list of images."""

    captions: dict[str, tuple[str, ...]]
    """Captions by URL or path, in the order of the list; rows with the same URL are captions of one image."""
    revision: str
    """SHA-256 of the list."""
    notes: tuple[str, ...]
    """Sentences on unused rows."""


def read_list(dataset: ImageDataset) -> ImageList:
    """Return the list of a dataset of type csv.

    The list has a header, is UTF-8 or UTF-16 with a byte order mark, and its columns are separated by comma, semicolon, tab or bar.
    Raises SourceError if it cannot be read, lacks a column, or has a row that does not match its header.
    """
    path = dataset.csv_file
    if path is None:
        raise AssertionError("the settings validation requires csv_file for a dataset of type csv")
    where = f"dataset {dataset.id!r} in multidatabackend.json: csv_file {str(path)!r}"
    try:
        text, status = decode_text(path.read_bytes())
        revision = sha256_file(path)
    except FileNotFoundError as error:
        raise SourceError(f"{where} does not exist. Write the path of the list.") from error
    except OSError as error:
        raise SourceError(
            f"{where} cannot be read: {error.strerror}. Give this user read permission."
        ) from error
    if status != OK:
        raise SourceError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    delimiter = _delimiter(text, dataset.csv_url_column)
    _check_columns(dataset, where, text, delimiter)
    captions: dict[str, dict[str, None]] = {}
    lines_without_url: list[int] = []
    try:
        for line, row in csv_rows(text, delimiter):
            if url := row[dataset.csv_url_column].strip():
                caption = row.get(dataset.csv_caption_column, "").strip()
                captions.setdefault(url, {}).update({caption: None} if caption else {})
            else:
                lines_without_url.append(line)
    except TableError as error:
        raise SourceError(f"{where}: {error}") from error
    if not captions:
        raise SourceError(
            f"{where} has no images. Write a row for each, with its URL or path in {dataset.csv_url_column}."
        )
    notes = tuple(unnamed_notes(path.name, dataset.csv_url_column, lines_without_url))
    return ImageList({url: tuple(texts) for url, texts in captions.items()}, revision, notes)


def _check_columns(dataset: ImageDataset, where: str, text: str, delimiter: str) -> None:
    columns = [name.strip() for name in next(csv.reader([_header(text)], delimiter=delimiter), [])]
    required = {"csv_url_column": dataset.csv_url_column}
    if dataset.caption_strategy == "csv":
        required["csv_caption_column"] = dataset.csv_caption_column
    for key, column in required.items():
        if column not in columns:
            raise SourceError(
                f"{where} has no column {column!r}, the value of {key}; it has {', '.join(columns) or 'none'}. Write one of them in {key}."
            )


def local_file(dataset: ImageDataset, url: str) -> Path | None:
    """Return the local file of a path or file:// URL in the list, relative to the list's folder; None if there is none."""
    if dataset.csv_file is None:
        return None
    try:
        path = Path(unquote(urlsplit(url).path) if protocol_of(url) == "file" else url)
        path = dataset.csv_file.parent / path.expanduser()
        return path.absolute() if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, not a valid URL, or the home of an unknown user
        return None


def _header(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _delimiter(text: str, url_column: str) -> str:
    """Return the delimiter of the header: the first that yields the URL column, else the most frequent one."""
    header = _header(text)
    for mark in _DELIMITERS:
        if url_column in (name.strip() for name in next(csv.reader([header], delimiter=mark), [])):
            return mark
    return max(_DELIMITERS, key=header.count)


def _download_job(
    dataset: ImageDataset, cache: DownloadCache, url: str, identity: str, names: dict[str, str]
) -> Callable[[], int]:
    def fetch() -> int:
        with cache.temporary_path() as temporary:
            if protocol_of(url) in ("http", "https"):
                download(url, temporary, dataset.allow_private_addresses)
            elif protocol_of(url) not in STORES and not dataset.allow_private_addresses:
                raise FetchError(
                    f"{protocol_of(url)}:// is not supported in a list, since its connections cannot be checked; write http, https, "
                    "s3 or gs, or allow_private_addresses: true in this dataset's entry"
                )
            else:
                fetch_remote(dataset, *open_file(dataset, url), temporary)
            with temporary.open("rb") as file:
                suffix = suffix_of(file.read(HEAD_BYTES)) or _suffix_of(url)
            name = identity + suffix
            size = cache.add(temporary, name, identity)
            names[url] = name
            return size

    return fetch


def _suffix_of(url: str) -> str:
    suffix = Path(unquote(urlsplit(url).path)).suffix.lower()
    return suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ""
