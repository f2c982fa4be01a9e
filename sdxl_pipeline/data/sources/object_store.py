"""Images from an object store or any other folder that fsspec reads: s3://, gs://, https:// and more."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sdxl_pipeline.config.credentials import HIDDEN, without_credentials
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.address_guard import AddressGuard, own_host, refusal_message
from sdxl_pipeline.data.sources.download import (
    DISK_ERRORS,
    DownloadCache,
    FetchError,
    Progress,
    fetch_all,
    retry,
)
from sdxl_pipeline.data.sources.fetch_result import FetchResult, SourceError
from sdxl_pipeline.data.sources.remote_names import (
    bucket_url,
    invalid_name_reason,
    missing_extra,
    names_used_as_folders,
    protocol_of,
)
from sdxl_pipeline.files.digest import digest_json

_STAMP_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "LastModified",
    "Last-Modified",
    "updated",
    "mtime",
    "modified",
)
"""Keys under which file systems report the version of a file, the most reliable first."""


def fetch_bucket(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> FetchResult:
    """Synchronize `folder`/files with the bucket: download new and changed files, and remove deleted ones.

    A file counts as changed if its size or entity tag (or else its time) differs. Raises SourceError if the bucket cannot be listed or
    is empty.
    """
    url = bucket_url(dataset)
    filesystem, root = _open(dataset, url)
    with DownloadCache(folder).locked() as cache:
        remote, failed = _list(dataset, url, filesystem, root)
        pending = {name: entry for name, entry in remote.items() if not cache.contains(name, entry["stamp"])}
        total = len(remote)
        jobs = {
            name: partial(_fetch, dataset, filesystem, cache, name, entry) for name, entry in pending.items()
        }
        cache.retain(set(remote))
        received, not_downloaded = fetch_all(jobs, on_progress, total - len(pending), total)
        # An older copy of a file must not be used for its new version.
        cache.retain({name for name in remote if name not in not_downloaded})
    failed |= {name: f"download failed: {reason}" for name, reason in not_downloaded.items()}
    return FetchResult(
        cache.files,
        revision=digest_json([[name, entry["stamp"]] for name, entry in sorted(remote.items())]),
        files=total + len(failed) - len(not_downloaded),
        downloaded=len(pending) - len(not_downloaded),
        downloaded_bytes=received,
        failed=tuple(sorted(failed.items())),
    )


def open_file(dataset: ImageDataset, url: str) -> tuple[Any, str]:
    """Return the file system of a URL, with the dataset's credentials, and the path in it. Raise FetchError if it cannot be opened."""
    if install_hint := missing_extra(url):
        raise FetchError(install_hint)
    try:
        return _filesystem(dataset, url)
    except Exception as error:  # each file system has its own errors
        raise FetchError(redacted_message(error, dataset)) from error


def fetch_remote(dataset: ImageDataset, filesystem: Any, path: str, target: Path) -> None:
    """Copy one remote file to `target`. Raise FetchError if that fails."""
    try:
        filesystem.get_file(path, str(target))
    except PermissionError as error:
        raise FetchError(redacted_message(error, dataset)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise _fetch_error(error, dataset, "the file does not exist (any more)") from error


def _fetch_error(error: Exception, dataset: ImageDataset, if_absent: str) -> FetchError:
    """Return the FetchError for a file system's error: retryable unless the file is absent or its address is private."""
    if refusal := refusal_message(error):  # some file systems convert every error to FileNotFoundError
        return FetchError(refusal)
    if isinstance(error, FileNotFoundError):
        return FetchError(if_absent)
    return FetchError(redacted_message(error, dataset), retryable=True)


def redacted_message(error: BaseException, dataset: ImageDataset) -> str:
    """Return an error of a library as one line without secrets."""
    text = without_credentials(str(error).strip().split("\n", 1)[0]) or type(error).__name__
    for secret in (dataset.aws_access_key_id, dataset.aws_secret_access_key, dataset.aws_session_token):
        if secret is not None and secret.get_secret_value():
            text = text.replace(secret.get_secret_value(), HIDDEN)
    return text


def _open(dataset: ImageDataset, url: str) -> tuple[Any, str]:
    if install_hint := missing_extra(url):
        raise SourceError(f"{_where(dataset, url)}: {install_hint}")
    try:
        return _filesystem(dataset, url)
    except Exception as error:
        raise SourceError(
            f"{_where(dataset, url)} cannot be opened: {redacted_message(error, dataset)}. Write a URL that fsspec reads, such as s3://bucket/photos."
        ) from None  # the cause would be logged, and its message may contain a secret


_filesystem_lock = threading.Lock()


def _filesystem(dataset: ImageDataset, url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol_of(url) in ("s3", "s3a"):
        credentials = {
            "key": dataset.aws_access_key_id,
            "secret": dataset.aws_secret_access_key,
            "token": dataset.aws_session_token,
        }
        options |= {
            name: secret.get_secret_value() for name, secret in credentials.items() if secret is not None
        }
        if dataset.aws_endpoint_url is not None:
            options["endpoint_url"] = dataset.aws_endpoint_url
        if dataset.aws_region_name is not None:
            options["client_kwargs"] = {"region_name": dataset.aws_region_name}
    elif protocol_of(url) in ("http", "https") and not dataset.allow_private_addresses:
        options |= {"get_client": _guarded_client(url), "skip_instance_cache": True}
    with _filesystem_lock:  # fsspec keeps one instance for equal options, and makes it without a lock
        filesystem, path = url_to_fs(url, **options)
    return filesystem, path


def _guarded_client(url: str) -> Callable[..., Any]:
    """Return what makes aiohttp's client for a page that the user named: its host is allowed, other private addresses are not."""
    guard = AddressGuard(own_host(url))

    async def client(**options: Any) -> Any:
        import aiohttp

        connector = aiohttp.TCPConnector(socket_factory=guard.open_socket)
        return aiohttp.ClientSession(connector=connector, **options)

    return client


def _list(
    dataset: ImageDataset, url: str, filesystem: Any, root: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the remote path and stamp of every file by its name relative to `root`, and the reasons for files that cannot be used."""
    where = _where(dataset, url)
    is_http = protocol_of(url) in ("http", "https")
    try:
        entries = (
            _crawl_links(dataset, filesystem, root.rstrip("/") + "/") if is_http else _find(filesystem, root)
        )
        found = dict(entries)
    except FileNotFoundError as error:
        raise SourceError(f"{where} does not exist. Correct the bucket or the folder within it.") from error
    except Exception as error:
        raise SourceError(
            f"{where} cannot be listed: {redacted_message(error, dataset)}. Check the address, and the credentials in the environment or in "
            "aws_access_key_id and aws_secret_access_key."
        ) from None
    reasons = {name: invalid_name_reason(name) for name in found}
    reasons |= dict.fromkeys(names_used_as_folders(found), "the name is also that of a folder")
    failed = {name: f"cannot be stored as a file: {reason}" for name, reason in reasons.items() if reason}
    found = {name: entry for name, entry in found.items() if name not in failed}
    if not found and not failed:
        raise SourceError(
            f"{where} has no files. Correct the bucket or the folder within it, or upload images to it."
        )
    if is_http:  # a page of links has no file metadata
        jobs: dict[str, Callable[[], int]] = {
            name: partial(_fetch_stamp, dataset, filesystem, entry) for name, entry in found.items()
        }
        without_stamp = fetch_all(jobs, None, 0, len(jobs))[1]
        failed |= {name: f"download failed: {reason}" for name, reason in without_stamp.items()}
        found = {name: entry for name, entry in found.items() if name not in without_stamp}
    return found, failed


def _find(filesystem: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    root = root.rstrip("/")
    for path, info in filesystem.find(root, detail=True).items():
        name = path[len(root) + 1 :] if path.startswith(root + "/") else path.rsplit("/", 1)[-1]
        if name and not name.endswith("/"):
            yield name, {"path": path, "stamp": _stamp(info)}


def _crawl_links(dataset: ImageDataset, filesystem: Any, page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files linked from a page and from the pages below it; links to other folders are ignored."""
    pending, seen = [page], {page}
    while pending:
        here = pending.pop()
        for entry in retry(partial(_links, dataset, filesystem, here)):
            url = entry["name"]
            if not url.startswith(page) or "?" in url or "#" in url or url in seen:
                continue  # sort orders of the same listing, and parent folders
            seen.add(url)
            if url.endswith("/"):
                pending.append(url)
            else:
                yield unquote(url[len(page) :]), {"path": url, "stamp": None}


def _links(dataset: ImageDataset, filesystem: Any, page: str) -> list[dict[str, Any]]:
    try:
        links: list[dict[str, Any]] = filesystem.ls(page, detail=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _fetch_error(error, dataset, "") from error
    return links


def _fetch_stamp(dataset: ImageDataset, filesystem: Any, entry: dict[str, Any]) -> int:
    try:
        entry["stamp"] = _stamp(filesystem.info(entry["path"]))
    except Exception as error:
        raise _fetch_error(error, dataset, "404 Not Found") from error
    return 0


def _stamp(info: dict[str, Any]) -> list[Any]:
    state = next((info[key] for key in _STAMP_KEYS if info.get(key) is not None), None)
    return [info.get("size"), None if state is None else str(state)]


def _fetch(
    dataset: ImageDataset, filesystem: Any, cache: DownloadCache, name: str, entry: dict[str, Any]
) -> int:
    with cache.temporary_path() as temporary:
        fetch_remote(dataset, filesystem, entry["path"], temporary)
        received_bytes, expected = temporary.stat().st_size, entry["stamp"][0]
        if expected is not None and received_bytes != expected:
            raise FetchError(f"{received_bytes} of {expected} bytes were received", retryable=True)
        return cache.add(temporary, name, entry["stamp"])


def _where(dataset: ImageDataset, url: str) -> str:
    key = "url" if dataset.url is not None else "aws_bucket_name"
    return f"dataset {dataset.id!r} in multidatabackend.json: {key} {without_credentials(url)!r}"
