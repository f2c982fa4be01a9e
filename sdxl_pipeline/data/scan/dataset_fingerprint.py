"""Has anything changed? Answered from names, sizes and times on this machine alone, so that a sensor can ask every minute.

What lies elsewhere is not asked: a sensor would list a bucket of a million files every minute, and take a broken connection for a
change. The schedule does not need to know; its run looks, downloads what is new, and reuses everything else if there is nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.caption_rules import complete_caption_settings
from sdxl_pipeline.data.captions.caption_tables import table_path
from sdxl_pipeline.data.scan.file_listing import find_files
from sdxl_pipeline.files.digest import digest_json

METADATA_ENTRY = "fingerprint"
"""Name under which assets record the state that they saw."""

OVERRIDES_ENTRY = "overridden_settings"
"""Name under which a LoRA records the settings that make it differ from the configured one."""


def folder_fingerprint(folder: Path) -> str:
    """Digest of the name, size and modification time of every file below `folder`; "absent" when there is none.

    Reads no file, so an edit that keeps size and time is not seen.
    """
    if not folder.is_dir():
        return "absent"
    files = find_files(folder)
    return digest_json(
        [
            list(row)
            for row in zip(files["path"], files["size"].tolist(), files["mtime_ns"].tolist(), strict=True)
        ]
    )


def dataset_fingerprint(dataset: ImageDataset) -> str:
    """State of everything on this machine that a dataset is read from: its folder or list, its caption table, its filter list.

    "not watched" for the images of one that lies elsewhere, and of one whose files `skip_file_discovery` says are not to be looked
    at. No secret of the dataset goes in.
    """
    if dataset.skipped_stages & {"metadata", "aspect"}:
        return "not watched"
    images, beside = "not watched", [dataset.caption_filter_list, dataset.csv_file]
    if dataset.type == "local" and dataset.instance_data_dir is not None:
        images = folder_fingerprint(dataset.instance_data_dir)
        beside = [dataset.caption_filter_list, table_path(dataset, dataset.instance_data_dir)]
    states = [_state(path) for path in beside if isinstance(path, Path)]
    return digest_json([images, states]) if states else images


def has_remote_datasets(project: Project) -> bool:
    """Whether the project has images whose changes cannot be seen from this machine. One pinned commit never changes."""
    return any(
        dataset.type != "local"
        and not (dataset.type == "huggingface" and re.fullmatch("[0-9a-f]{40}", dataset.revision or ""))
        for dataset in (*project.datasets, *project.mask_datasets)
    )


def folder_states(project: Project) -> dict[str, str]:
    """Return the `dataset_fingerprint` of each dataset as it is now, by dataset asset key."""
    return {
        f"{project.name}/{dataset.asset_name}/dataset": dataset_fingerprint(dataset)
        for dataset in _complete_datasets(project)
    }


def project_fingerprint(
    project: Project, folders: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> str:
    """Return the digest of a project's settings and of the state of its data folders.

    `folders` gives states recorded earlier, by dataset asset key; without it the folders are read now. `overrides` are the settings that
    a run replaced, with the values it used: its fingerprint is not that of the configuration.
    """
    datasets = _complete_datasets(project)
    if folders is None:
        folders = folder_states(project)
    settings = [
        project.training.model_dump(mode="json"),
        [dataset.model_dump(mode="json") for dataset in datasets],
        [list(prompt) for prompt in project.prompts],
    ]
    return digest_json([dict(folders), settings, *([dict(overrides)] if overrides else [])])


def _complete_datasets(project: Project) -> list[ImageDataset]:
    return [
        complete_caption_settings(dataset, project.text_embeds_of(dataset), project.training.seed)
        for dataset in (*project.datasets, *project.mask_datasets)
    ]


def _state(file: Path) -> list[int]:
    try:
        info = file.stat()
    except OSError:
        return []
    return [info.st_size, info.st_mtime_ns]
