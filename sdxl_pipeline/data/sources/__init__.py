"""Sources of datasets: local folders, Hub repositories, object stores and lists of URLs.

A dataset of type local is read in its folder. Every other type is downloaded into a folder under the storage root, from which all
downstream stages read it like a local folder.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.fetch_result import FetchResult, SourceError, data_folder

__all__ = ["Fetched", "SourceError", "data_folder", "fetch_source"]


def fetch_source(
    dataset: ImageDataset, sources: Path, on_progress: Callable[[int, int], None] | None = None
) -> FetchResult:
    """Download the new and changed images of a dataset and return the result.

    Files are written only under `sources`, a list's `csv_cache_dir` and the Hub's cache. The folder never contains a partial file: an
    interrupted fetch leaves files out, and the next one continues. `on_progress(done, total)` counts files. Files that cannot be
    downloaded are listed in the result's `failed` and tried again the next time. Raises SourceError if the source as a whole cannot
    be read.
    """
    started = time.monotonic()
    match dataset.type:
        case "local":
            return FetchResult(data_folder(dataset, sources))
        case "huggingface":
            from sdxl_pipeline.data.sources.hub_dataset import fetch_hub_dataset as fetch
        case "aws":
            from sdxl_pipeline.data.sources.object_store import fetch_bucket as fetch
        case "csv":
            from sdxl_pipeline.data.sources.url_lists import fetch_list as fetch
    folder = data_folder(dataset, sources).parent
    try:
        fetched = fetch(dataset, folder, on_progress)
    except OSError as error:
        raise SourceError(
            f"dataset {dataset.id!r} in multidatabackend.json: its images cannot be stored in {folder}: {error.strerror or error}. Free disk "
            "space, give this user write permission, or set SDXL_PIPELINE_STORAGE to another folder."
        ) from error
    return replace(fetched, seconds=time.monotonic() - started)
