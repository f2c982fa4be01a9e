"""Images from a bucket, or from any folder that fsspec reads: s3://, gs://, https:// and more."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sdxl_pipeline.config.credentials import HIDDEN, without_credentials
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.address_guard import AddressGuard, own_host, refused
from sdxl_pipeline.data.sources.download import (
    DISK_ERRORS,
    DownloadCache,
    FetchError,
    Progress,
    fetch_all,
    retry,
)
from sdxl_pipeline.data.sources.fetch_result import Fetched, SourceError
from sdxl_pipeline.data.sources.remote_names import (
    bucket_url,
    missing_extra,
    names_in_the_way,
    protocol_of,
    why_not_local,
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
"""What file systems call the state of a file's content, the surest first."""


def fetch_bucket(dataset: ImageDataset, folder: Path, on_progress: Progress | None) -> Fetched:
    """Bring the bucket's files into `folder`/files: the new and the changed ones come, those that are gone at the source go.

    A file has changed when its size or its entity tag (where there is none, its time) has. Raises SourceError when the bucket cannot
    be listed, or is empty.
    """
    address = bucket_url(dataset)
    filesystem, root = _open(dataset, address)
    with DownloadCache(folder).opened() as cache:
        remote, failed = _list(dataset, address, filesystem, root)
        pending = {name: entry for name, entry in remote.items() if not cache.holds(name, entry["stamp"])}
        total = len(remote)
        jobs = {
            name: partial(_fetch, dataset, filesystem, cache, name, entry) for name, entry in pending.items()
        }
        cache.keep_only(set(remote))
        received, lost = fetch_all(jobs, on_progress, total - len(pending), total)
        # A file of which only an older copy is here must not stand for the new one.
        cache.keep_only({name for name in remote if name not in lost})
    failed |= {name: f"download failed: {reason}" for name, reason in lost.items()}
    return Fetched(
        cache.files,
        revision=digest_json([[name, entry["stamp"]] for name, entry in sorted(remote.items())]),
        files=total + len(failed) - len(lost),
        downloaded=len(pending) - len(lost),
        downloaded_bytes=received,
        failed=tuple(sorted(failed.items())),
    )


def open_file(dataset: ImageDataset, address: str) -> tuple[Any, str]:
    """The file system of one address, with the dataset's credentials, and the path there. Raises FetchError."""
    if lacking := missing_extra(address):
        raise FetchError(lacking)
    try:
        return _filesystem(dataset, address)
    except Exception as error:  # each file system has errors of its own
        raise FetchError(tell(error, dataset)) from error


def fetch_remote(dataset: ImageDataset, filesystem: Any, path: str, target: Path) -> None:
    """Copy one remote file. Raises FetchError."""
    try:
        filesystem.get_file(path, str(target))
    except PermissionError as error:
        raise FetchError(tell(error, dataset)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise _fetch_error(error, dataset, "it is not there (any more)") from error


def _fetch_error(error: Exception, dataset: ImageDataset, if_absent: str) -> FetchError:
    """Return what a file system's error means for one file: to be tried again, unless it is absent or its address is refused."""
    if refusal := refused(error):  # some file systems turn every error into a FileNotFoundError
        return FetchError(refusal)
    if isinstance(error, FileNotFoundError):
        return FetchError(if_absent)
    return FetchError(tell(error, dataset), again=True)


def tell(error: BaseException, dataset: ImageDataset) -> str:
    """What an error of a library says, in a line, and without any secret."""
    text = without_credentials(str(error).strip().split("\n", 1)[0]) or type(error).__name__
    for secret in (dataset.aws_access_key_id, dataset.aws_secret_access_key, dataset.aws_session_token):
        if secret is not None and secret.get_secret_value():
            text = text.replace(secret.get_secret_value(), HIDDEN)
    return text


def _open(dataset: ImageDataset, address: str) -> tuple[Any, str]:
    if lacking := missing_extra(address):
        raise SourceError(f"{_where(dataset, address)}: {lacking}")
    try:
        return _filesystem(dataset, address)
    except Exception as error:
        raise SourceError(
            f"{_where(dataset, address)} cannot be opened: {tell(error, dataset)}. Write a URL that fsspec reads, such as s3://bucket/photos."
        ) from None  # a library's own words may hold a key, and causes are logged


_making = threading.Lock()


def _filesystem(dataset: ImageDataset, address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol_of(address) in ("s3", "s3a"):
        given = {
            "key": dataset.aws_access_key_id,
            "secret": dataset.aws_secret_access_key,
            "token": dataset.aws_session_token,
        }
        options |= {name: secret.get_secret_value() for name, secret in given.items() if secret is not None}
        if dataset.aws_endpoint_url is not None:
            options["endpoint_url"] = dataset.aws_endpoint_url
        if dataset.aws_region_name is not None:
            options["client_kwargs"] = {"region_name": dataset.aws_region_name}
    elif protocol_of(address) in ("http", "https") and not dataset.allow_private_addresses:
        options |= {"get_client": _guarded_client(address), "skip_instance_cache": True}
    with _making:  # fsspec keeps one instance for equal options, and makes it without a lock
        filesystem, path = url_to_fs(address, **options)
    return filesystem, path


def _guarded_client(address: str) -> Callable[..., Any]:
    """Return what makes aiohttp's client for a page that the user named: its host is allowed, other private addresses are not."""
    guard = AddressGuard(own_host(address))

    async def client(**options: Any) -> Any:
        import aiohttp

        connector = aiohttp.TCPConnector(socket_factory=guard.open_socket)
        return aiohttp.ClientSession(connector=connector, **options)

    return client


def _list(
    dataset: ImageDataset, address: str, filesystem: Any, root: str
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every file by its name seen from `root`, with its remote path and its stamp; and why the others cannot be had."""
    where = _where(dataset, address)
    is_http = protocol_of(address) in ("http", "https")
    try:
        walked = (
            _walk_links(dataset, filesystem, root.rstrip("/") + "/") if is_http else _find(filesystem, root)
        )
        found = dict(walked)
    except FileNotFoundError as error:
        raise SourceError(f"{where} does not exist. Correct the bucket or the folder within it.") from error
    except Exception as error:
        raise SourceError(
            f"{where} cannot be listed: {tell(error, dataset)}. Check the address, and the credentials in the environment or in "
            "aws_access_key_id and aws_secret_access_key."
        ) from None
    reasons = {name: why_not_local(name) for name in found}
    reasons |= dict.fromkeys(names_in_the_way(found), "the name is also that of a folder")
    failed = {name: f"cannot be a file here: {reason}" for name, reason in reasons.items() if reason}
    found = {name: entry for name, entry in found.items() if name not in failed}
    if not found and not failed:
        raise SourceError(
            f"{where} holds no files. Correct the bucket or the folder within it, or put images into it."
        )
    if is_http:  # a page of links says nothing of the files
        jobs: dict[str, Callable[[], int]] = {
            name: partial(_look_up, dataset, filesystem, entry) for name, entry in found.items()
        }
        unknown = fetch_all(jobs, None, 0, len(jobs))[1]
        failed |= {name: f"download failed: {reason}" for name, reason in unknown.items()}
        found = {name: entry for name, entry in found.items() if name not in unknown}
    return found, failed


def _find(filesystem: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    root = root.rstrip("/")
    for path, info in filesystem.find(root, detail=True).items():
        name = path[len(root) + 1 :] if path.startswith(root + "/") else path.rsplit("/", 1)[-1]
        if name and not name.endswith("/"):
            yield name, {"path": path, "stamp": _stamp(info)}


def _walk_links(dataset: ImageDataset, filesystem: Any, page: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a page of links leads to, and the pages below it; nothing that lies elsewhere."""
    pending, seen = [page], {page}
    while pending:
        here = pending.pop()
        for entry in retry(partial(_links, dataset, filesystem, here)):
            address = entry["name"]
            if not address.startswith(page) or "?" in address or "#" in address or address in seen:
                continue  # orders of the same listing, and ways back up
            seen.add(address)
            if address.endswith("/"):
                pending.append(address)
            else:
                yield unquote(address[len(page) :]), {"path": address, "stamp": None}


def _links(dataset: ImageDataset, filesystem: Any, page: str) -> list[dict[str, Any]]:
    try:
        links: list[dict[str, Any]] = filesystem.ls(page, detail=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise _fetch_error(error, dataset, "") from error
    return links


def _look_up(dataset: ImageDataset, filesystem: Any, entry: dict[str, Any]) -> int:
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
    with cache.incoming() as temporary:
        fetch_remote(dataset, filesystem, entry["path"], temporary)
        came, expected = temporary.stat().st_size, entry["stamp"][0]
        if expected is not None and came != expected:
            raise FetchError(f"{came} of {expected} bytes came", again=True)
        return cache.put(temporary, name, entry["stamp"])


def _where(dataset: ImageDataset, address: str) -> str:
    key = "url" if dataset.url is not None else "aws_bucket_name"
    return f"dataset {dataset.id!r} in multidatabackend.json: {key} {without_credentials(address)!r}"
