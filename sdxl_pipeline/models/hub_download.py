"""Download of model files from the Hugging Face Hub: only the files in use, at a known revision, offline where possible."""

import logging
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdxl_pipeline.files.disk_space import DiskFullError, hub_cache_full_message, is_disk_full
from sdxl_pipeline.hub_client import describe_hub_error, retry_while_busy
from sdxl_pipeline.models.model_files import BaseModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository on the local disk, and their commit."""

    folder: Path
    revision: str


def download_snapshot(
    repo_id: str,
    revision: str | None,
    probes: Collection[str],
    choose: Callable[[Collection[str]], Iterable[str]],
) -> Snapshot:
    """Download the files that `choose` selects from the repository's listing into this machine's Hub cache.

    The commit and the listing come from the network or, without one, from the cache, in which `probes` are names of small files that
    the repository may have: one of them identifies the cached commit. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE have the same
    meaning as for huggingface_hub. Raises DiskFullError when the cache's disk is full, BaseModelError when the repository or revision
    does not exist, needs a token, or cannot be reached and is not cached, and any error of `choose`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or None

    def fetch(files: Collection[str], *, cached_only: bool) -> Path:
        download = partial(
            snapshot_download,
            repo_id,
            revision=revision,
            allow_patterns=list(files),
            endpoint=endpoint,
            local_files_only=cached_only,
        )
        try:
            return Path(retry_while_busy(download, f"Downloading {repo_id}", retry_connection_errors=False))
        except Exception as error:
            if not is_disk_full(error):
                raise
            needed = None
            with suppress(Exception):  # only on failure, since it takes a request per file
                needed = sum(file.file_size for file in download(dry_run=True) if file.will_download)
            raise DiskFullError(hub_cache_full_message(Path(HF_HUB_CACHE), repo_id, needed)) from error

    unreachable: Exception | None = None
    try:
        try:
            info = retry_while_busy(
                partial(HfApi(endpoint=endpoint).model_info, repo_id, revision=revision),
                f"Listing {repo_id}",
                retry_connection_errors=False,
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError):
            raise
        except (HTTPError, OfflineModeIsEnabled) as error:
            # Nothing asks the network again: each of huggingface_hub's calls would wait for its own retries.
            unreachable = error
            logger.info(
                "%s cannot be reached (%s); its cached files are used.", repo_id, type(error).__name__
            )
            folder = fetch(probes, cached_only=True)
            files = tuple(choose(_cached_files(folder)))
        else:
            files = tuple(choose([file.rfilename for file in info.siblings or ()]))
            # by its branch or tag, so that the cache knows the commit of that name without a network
            folder = fetch(files, cached_only=False)
    except GatedRepoError as error:
        raise BaseModelError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"{repo_id} has no revision {revision!r}. Give a branch, tag or commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"{repo_id} is not a repository of the Hub that this machine may read. Correct the name; for a private one, set HF_TOKEN "
            "or run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise BaseModelError(f"{repo_id!r} is not a valid repository name: {error}") from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise BaseModelError(
            f"{repo_id} cannot be reached, and this machine's Hub cache lacks some of its files "
            f"({describe_hub_error(unreachable or error)}). Connect once, or give a local folder."
        ) from error
    if missing := [name for name in files if not (folder / name).exists()]:
        raise BaseModelError(f"{repo_id}: the download lacks {', '.join(missing)}. Run again.")
    return Snapshot(folder, folder.name)


def _cached_files(folder: Path) -> list[str]:
    # a link with a missing blob counts as absent
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
