"""Dataset repositories of the Hugging Face Hub: files of a commit, and their download into the Hub cache."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sdxl_pipeline.config.credentials import without_credentials
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.address_guard import guarded_hub_client
from sdxl_pipeline.data.sources.download import DISK_ERRORS, FetchError
from sdxl_pipeline.data.sources.fetch_result import SourceError
from sdxl_pipeline.files.disk_space import DiskFullError, hub_cache_full_message, is_disk_full
from sdxl_pipeline.hub_client import retry_while_busy


@dataclass(frozen=True)
class HubRepository:
    """A dataset repository at one commit."""

    name: str
    commit: str
    files: dict[str, str]
    """Content digest of each file by path."""


@dataclass
class Content:
    """Content of the folder of one commit."""

    files: int
    """Number of images of the split, including failed ones."""
    captions: dict[str, tuple[str, ...]] | None
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences on unused rows of its tables."""
    written: int = 0
    """Number of new images apart from the files downloaded from the repository."""
    received: int = 0
    """Downloaded bytes of these images."""
    shards: set[str] = field(default_factory=set)
    """Names of the referenced folders of extracted images."""


class HubUnreachableError(Exception):
    """The Hub cannot be reached: no network, or offline mode."""


def where(dataset: ImageDataset, key: str = "dataset_name") -> str:
    """Return the beginning of an error message: dataset, key and value."""
    return f"dataset {dataset.id!r} in multidatabackend.json: {key} {getattr(dataset, key)!r}"


def open_repository(dataset: ImageDataset, previous: HubRepository | None = None) -> HubRepository:
    """Return the dataset's repository at its revision; `previous` is returned without a listing if the commit is the same.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have the same meaning as in huggingface_hub. Raises SourceError if the repository
    or the revision does not exist or access is denied, HubUnreachableError if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile

    name = dataset.dataset_name
    if name is None:
        raise AssertionError(
            "the settings validation requires dataset_name for a dataset of type huggingface"
        )
    api = HfApi(endpoint=_endpoint())
    try:
        info = partial(api.dataset_info, name, revision=dataset.revision)
        commit = retry_while_busy(info, f"Asking the Hub for {name}", retry_connection_errors=False).sha
        if previous is not None and previous.commit == commit:
            return previous
        tree = api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
        files = {
            entry.path: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            for entry in tree
            if isinstance(entry, RepoFile)
        }
    except GatedRepoError as error:
        raise SourceError(
            f"{where(dataset)} is gated: accept its terms at https://huggingface.co/datasets/{name}, then set HF_TOKEN or run "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{where(dataset, 'revision')} does not exist in {name}. Write a branch, tag or commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{where(dataset)} does not exist on the Hub, or access is denied. Correct the name; if it is private, set HF_TOKEN "
            "or run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{where(dataset)} is not a valid repository name. Write owner/name.") from error
    except FetchError as error:  # the Hub redirects to a private address
        raise SourceError(f"{where(dataset)} cannot be read: {error}.") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise HubUnreachableError(error_message(error)) from error
    if commit is None:
        raise HubUnreachableError(f"the Hub returned no commit of {name}")
    return HubRepository(name, commit, files)


def is_cached(repository: HubRepository, path: str) -> bool:
    """Return whether a file's content is in this machine's Hub cache, for any commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository.name, repo_type="dataset"))
    return (folder / "blobs" / repository.files[path]).is_file()


def download_file(repository: HubRepository, path: str) -> Path:
    """Return the path of a file in the Hub cache, resuming an interrupted download. Raise FetchError if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        cached = hf_hub_download(
            repository.name,
            path,
            repo_type="dataset",
            revision=repository.commit,
            endpoint=_endpoint(),
        )
    except LocalEntryNotFoundError as error:
        raise FetchError(error_message(error), retryable=True) from error
    except EntryNotFoundError as error:
        raise FetchError("the file does not exist (any more)") from error
    except HfHubHTTPError as error:
        raise FetchError(error_message(error), retryable=error.response.status_code >= 429) from error
    except (
        HTTPError,
        OfflineModeIsEnabled,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: hf_xet's only error
        if is_disk_full(error):
            raise DiskFullError(hub_cache_full_message(Path(HF_HUB_CACHE), path)) from error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise FetchError(error_message(error), retryable=True) from error
    return Path(cached).resolve()


def error_message(error: BaseException) -> str:
    """Return an error of the client as one line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {without_credentials(text)}" if text else type(error).__name__


def checked_connections(dataset: ImageDataset) -> AbstractContextManager[None]:
    """Return a context that rejects the Hub client's connections to private addresses except those of HF_ENDPOINT's host."""
    from huggingface_hub import constants

    return guarded_hub_client(dataset, _endpoint() or constants.ENDPOINT)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
