"""Has anything changed? Answered from names, sizes and times alone, so that a sensor can ask every minute."""

from collections.abc import Mapping
from pathlib import Path

from sdxl_pipeline.images.walk import find_files
from sdxl_pipeline.project.project import Project
from sdxl_pipeline.store.digest import digest_json

METADATA_ENTRY = "fingerprint"
"""Name under which assets record the state that they saw."""


def folder_fingerprint(folder: Path) -> str:
    """Digest of the name, size and modification time of every file below `folder`; "absent" when there is none.

    Reads no file, so an edit that keeps size and time is not seen; the scan, which hashes contents, sees it.
    """
    if not folder.is_dir():
        return "absent"
    return digest_json([[file.path, file.size, file.mtime_ns] for file in find_files(folder)])


def project_fingerprint(project: Project, folders: Mapping[str, str] | None = None) -> str:
    """Digest of a project's settings and of the state of its data folders.

    `folders` gives states recorded earlier, by dataset asset key; without it the folders are looked at now.
    """
    if folders is None:
        folders = {
            f"{project.name}/{dataset.asset_name}/dataset": folder_fingerprint(dataset.instance_data_dir)
            for dataset in project.datasets
        }
    settings = [
        project.training.model_dump(mode="json"),
        [dataset.model_dump(mode="json") for dataset in project.datasets],
        [list(prompt) for prompt in project.prompts],
    ]
    return digest_json([dict(folders), settings])
