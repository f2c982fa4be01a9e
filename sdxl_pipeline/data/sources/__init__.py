"""Where images come from, and how they come to lie in a folder of this machine.

A dataset of type local is read where it is. Every other type is downloaded into a folder under the storage's root, of which
everything downstream then reads as if it were the user's own.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.sources.fetch_result import Fetched, SourceError, data_folder

__all__ = ["Fetched", "SourceError", "data_folder", "fetch_source"]


def fetch_source(
    dataset: ImageDataset, sources: Path, on_progress: Callable[[int, int], None] | None = None
) -> Fetched:
    """Bring a dataset's images to this machine, those that are new or have changed at their source, and say what came.

    Nothing is written but under `sources`, a list's `csv_cache_dir` and the Hub's own cache. What lies in the folder is whole at any
    moment: a killed fetch leaves files out, never half of one, and the next goes on from there. `on_progress(done, total)` counts
    files. Single files that cannot be had are told in `Fetched.failed`, and tried again the next time. Raises SourceError when the
    source as a whole cannot be read.
    """
    began = time.monotonic()
    match dataset.type:
        case "local":
            return Fetched(data_folder(dataset, sources))
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
            f"dataset {dataset.id!r} in multidatabackend.json: its images cannot be kept in {folder}: {error.strerror or error}. Make "
            "room there, give this user the right to write there, or name another storage folder in SDXL_PIPELINE_STORAGE."
        ) from error
    return replace(fetched, seconds=time.monotonic() - began)
