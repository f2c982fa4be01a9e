"""Dataset repositories of the Hugging Face Hub: what they hold at which commit, and single files of them in the Hub's cache."""

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
from sdxl_pipeline.hub_client import repeat_while_busy


@dataclass(frozen=True)
class HubRepository:
    """A dataset repository at one commit."""

    name: str
    commit: str
    files: dict[str, str]
    """The digest of each file's content, by its path."""


@dataclass
class Content:
    """What the folder of one commit was filled with."""

    files: int
    """Images of the split, had or not."""
    captions: dict[str, tuple[str, ...]] | None
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences on rows of its tables that are not used."""
    written: int = 0
    """Images that were not on this machine before, beside the files that were downloaded from the repository."""
    received: int = 0
    """Bytes of them that came over the network."""
    shards: set[str] = field(default_factory=set)
    """Names of the folders of written-out images that it refers to."""


class HubUnreachableError(Exception):
    """The Hub cannot be asked now: there is no network, or offline mode is on."""


def where(dataset: ImageDataset, key: str = "dataset_name") -> str:
    """The head of a message: which dataset, which key, which value."""
    return f"dataset {dataset.id!r} in multidatabackend.json: {key} {getattr(dataset, key)!r}"


def open_repository(dataset: ImageDataset, seen: HubRepository | None = None) -> HubRepository:
    """What the dataset's repository holds at its revision; `seen` is what it held before, and is not listed again at the same commit.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Raises SourceError when the repository
    or the revision does not exist or may not be read, HubUnreachableError when the Hub cannot be asked.
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
            "a dataset of type huggingface without repository passes no check of the settings"
        )
    api = HfApi(endpoint=_endpoint())
    try:
        info = partial(api.dataset_info, name, revision=dataset.revision)
        commit = repeat_while_busy(info, f"Asking the Hub for {name}", over_connections=False).sha
        if seen is not None and seen.commit == commit:
            return seen
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
            f"{where(dataset)} is no dataset of the Hub that this machine may read. Correct the name; if it is private, set HF_TOKEN "
            "or run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{where(dataset)} is no name of a repository. Write owner/name.") from error
    except FetchError as error:  # the Hub redirects to a private address
        raise SourceError(f"{where(dataset)} cannot be read: {error}.") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise HubUnreachableError(told(error)) from error
    if commit is None:
        raise HubUnreachableError(f"the Hub names no commit of {name}")
    return HubRepository(name, commit, files)


def is_cached(repository: HubRepository, path: str) -> bool:
    """Whether a file's content lies in this machine's Hub cache, be it of another commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository.name, repo_type="dataset"))
    return (folder / "blobs" / repository.files[path]).is_file()


def download_file(repository: HubRepository, path: str) -> Path:
    """A file's content in this machine's Hub cache; a download that broke off goes on where it did. Raises FetchError."""
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
        raise FetchError(told(error), again=True) from error
    except EntryNotFoundError as error:
        raise FetchError("it is not there (any more)") from error
    except HfHubHTTPError as error:
        raise FetchError(told(error), again=error.response.status_code >= 429) from error
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
        raise FetchError(told(error), again=True) from error
    return Path(cached).resolve()


def told(error: BaseException) -> str:
    """What an error of the client says, in a line."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {without_credentials(text)}" if text else type(error).__name__


def checked_connections(dataset: ImageDataset) -> AbstractContextManager[None]:
    """Refuse the Hub client's connections to private addresses other than those of HF_ENDPOINT's host, while the context is open."""
    from huggingface_hub import constants

    return guarded_hub_client(dataset, _endpoint() or constants.ENDPOINT)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
