"""Images from a list of addresses with captions: a CSV file."""

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
from sdxl_pipeline.data.sources.fetch_result import Fetched, SourceError
from sdxl_pipeline.data.sources.http_download import download
from sdxl_pipeline.data.sources.object_store import fetch_remote, open_file
from sdxl_pipeline.data.sources.remote_names import STORES, name_of_address, protocol_of
from sdxl_pipeline.files.atomic_files import sha256_file

_DELIMITERS: Final = ",;\t|"


def fetch_list(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> Fetched:
    """Bring the images at the list's addresses into `folder`/files; paths, seen from the list's folder, become links to the files.

    What has come once is not asked for again, and what has left the list goes. Raises SourceError when the list cannot be read or
    lacks a column.
    """
    listed = read_list(dataset)
    captions_of = listed.captions
    with DownloadCache(folder).opened() as cache:
        known = {str(stamp): name for name, stamp in cache.stamps.items() if cache.holds(name, stamp)}
        names, lost, jobs = {}, {}, {}
        for address in captions_of:
            if protocol_of(address) in ("", "file"):
                if (path := local_file(dataset, address)) is not None:
                    names[address] = name_of_address(address, _suffix_of(path.as_uri()))
                    cache.link(path, names[address])
                else:
                    cause = likely_cause(address, lambda name: local_file(dataset, name) is not None)
                    lost[address] = "there is no such file" + (f": {cause}" if cause else "")
                continue
            identity = name_of_address(address, "")  # the ledger holds no address, which may be a signed one
            if identity in known:
                names[address] = known[identity]
            else:
                jobs[address] = _job(dataset, cache, address, identity, names)
        received, not_had = fetch_all(jobs, on_progress, len(captions_of) - len(jobs), len(captions_of))
        cache.keep_only(set(names.values()))
    lost |= {address: f"download failed: {reason}" for address, reason in not_had.items()}
    return Fetched(
        cache.files,
        captions={
            names[address]: texts for address, texts in captions_of.items() if address in names and texts
        },
        revision=listed.revision,
        files=len(captions_of),
        downloaded=len(jobs) - len(not_had),
        downloaded_bytes=received,
        failed=tuple(sorted((without_credentials(address), reason) for address, reason in lost.items())),
        notes=listed.notes,
    )


class ImageList(NamedTuple):
    """What a list of addresses holds."""

    captions: dict[str, tuple[str, ...]]
    """The captions of each address, in the list's order. Rows of one address are captions of one image."""
    revision: str
    """The list's SHA-256."""
    notes: tuple[str, ...]
    """Sentences on rows that are not used."""


def read_list(dataset: ImageDataset) -> ImageList:
    """Read the list of a dataset of type csv.

    It has a header, is UTF-8 or UTF-16 with a byte order mark, and its columns are separated by comma, semicolon, tab or bar. Raises
    SourceError when it cannot be read, lacks a column, or has a row that does not fit its header.
    """
    path = dataset.csv_file
    if path is None:
        raise AssertionError("a dataset of type csv without list passes no check of the settings")
    where = f"dataset {dataset.id!r} in multidatabackend.json: csv_file {str(path)!r}"
    try:
        text, status = decode_text(path.read_bytes())
        revision = sha256_file(path)
    except FileNotFoundError as error:
        raise SourceError(f"{where} does not exist. Write the path of the list.") from error
    except OSError as error:
        raise SourceError(
            f"{where} cannot be read: {error.strerror}. Give this user the right to read it."
        ) from error
    if status != OK:
        raise SourceError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    delimiter = _delimiter(text, dataset.csv_url_column)
    _check_columns(dataset, where, text, delimiter)
    captions: dict[str, dict[str, None]] = {}
    unnamed: list[int] = []
    try:
        for line, row in csv_rows(text, delimiter):
            if address := row[dataset.csv_url_column].strip():
                caption = row.get(dataset.csv_caption_column, "").strip()
                captions.setdefault(address, {}).update({caption: None} if caption else {})
            else:
                unnamed.append(line)
    except TableError as error:
        raise SourceError(f"{where}: {error}") from error
    if not captions:
        raise SourceError(
            f"{where} names no images. Write a row for each, with its address in {dataset.csv_url_column}."
        )
    notes = tuple(unnamed_notes(path.name, dataset.csv_url_column, unnamed))
    return ImageList({address: tuple(texts) for address, texts in captions.items()}, revision, notes)


def _check_columns(dataset: ImageDataset, where: str, text: str, delimiter: str) -> None:
    columns = [name.strip() for name in next(csv.reader([_header(text)], delimiter=delimiter), [])]
    wanted = {"csv_url_column": dataset.csv_url_column}
    if dataset.caption_strategy == "csv":
        wanted["csv_caption_column"] = dataset.csv_caption_column
    for key, column in wanted.items():
        if column not in columns:
            raise SourceError(
                f"{where} has no column {column!r}, which {key} names; it has {', '.join(columns) or 'none'}. Write one of them in {key}."
            )


def local_file(dataset: ImageDataset, address: str) -> Path | None:
    """The file of this machine that an address of the list is of, seen from the list's folder; None when there is none."""
    if dataset.csv_file is None:
        return None
    try:
        path = Path(unquote(urlsplit(address).path) if protocol_of(address) == "file" else address)
        path = dataset.csv_file.parent / path.expanduser()
        return path.absolute() if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, no valid URL, the home of a user who is not there
        return None


def _header(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _delimiter(text: str, url_column: str) -> str:
    """Return what separates the header's columns: the first mark that makes the address column one of them, else a comma."""
    header = _header(text)
    for mark in _DELIMITERS:
        if url_column in (name.strip() for name in next(csv.reader([header], delimiter=mark), [])):
            return mark
    return max(_DELIMITERS, key=header.count)


def _job(
    dataset: ImageDataset, cache: DownloadCache, address: str, identity: str, names: dict[str, str]
) -> Callable[[], int]:
    def fetch() -> int:
        with cache.incoming() as temporary:
            if protocol_of(address) in ("http", "https"):
                download(address, temporary, dataset.allow_private_addresses)
            elif protocol_of(address) not in STORES and not dataset.allow_private_addresses:
                raise FetchError(
                    f"{protocol_of(address)}:// is not read from a list, since where it connects to cannot be checked; write http, https, "
                    "s3 or gs, or allow_private_addresses: true in this dataset's entry"
                )
            else:
                fetch_remote(dataset, *open_file(dataset, address), temporary)
            with temporary.open("rb") as file:
                suffix = suffix_of(file.read(HEAD_BYTES)) or _suffix_of(address)
            name = identity + suffix
            size = cache.put(temporary, name, identity)
            names[address] = name
            return size

    return fetch


def _suffix_of(address: str) -> str:
    suffix = Path(unquote(urlsplit(address).path)).suffix.lower()
    return suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ""
