"""What the projects reference: store entries by key, tables, downloads. In doubt, something counts as referenced."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_pipeline.cache.store.store_index import pack_keys
from sdxl_pipeline.config.loader import InvalidProject, Project, discover_projects
from sdxl_pipeline.data.sources import data_folder
from sdxl_pipeline.files.storage_layout import StorageLayout

DATASET_STAGES = ("dataset", "aspect_buckets", "vae_latents", "text_embeds")
_VALUE_STAGES = (*DATASET_STAGES, "masks")
_KEY_COLUMNS = {"vae_latents": "latent_key", "text_embeds": "embed_key"}


class PruneError(Exception):
    """Nothing can be freed. The message says why and what to do."""


@dataclass
class References:
    """Everything that is referenced, and everything that could not be determined."""

    projects: dict[str, frozenset[str] | None] = field(default_factory=dict)
    """Asset names of each project's datasets, by project name; None if unknown."""
    keys: dict[Path, list[np.ndarray]] = field(default_factory=dict)
    """Packed keys by store root; a store that is absent here belongs to no project."""
    retained_stores: dict[Path, str] = field(default_factory=dict)
    """Stores in which nothing may be deleted, and why."""
    files: set[Path] = field(default_factory=set)
    """Parquet tables referenced by manifests and specs."""
    outputs: set[Path] = field(default_factory=set)
    """Output folders of the projects: runs, evaluations and releases."""
    sources: set[Path] | None = field(default_factory=set)
    """Folders of downloads; None if unknown."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user."""

    def has_dataset(self, project: str, dataset: str) -> bool:
        """Return whether `dataset` belongs to an existing project."""
        if project not in self.projects:
            return False
        datasets = self.projects[project]
        return datasets is None or dataset in datasets


def references(layout: StorageLayout, projects_folder: Path) -> References:
    """Return what is referenced by the projects in `projects_folder` and in every other folder that has used this storage.

    Raises PruneError when a folder of projects does not exist, or a manifest cannot be read: references would be missing.
    """
    found = References(keys={layout.latents.resolve(): [], layout.text_embeds.resolve(): []})
    for project in _projects(layout, projects_folder):
        if isinstance(project, InvalidProject):
            _add_invalid_project(found, project)
        else:
            _add_project(found, layout, project)
    for name in found.projects:
        for stage, manifest in _manifests(layout, found, name):
            _add_manifest(found, stage, manifest)
        for spec in (layout.work / name).rglob("*.spec.json"):
            found.files.update(_tables_of_spec(spec))
    return found


def _projects(layout: StorageLayout, projects_folder: Path) -> Iterator[Project | InvalidProject]:
    folders = {projects_folder: None} | dict(layout.registered_projects())
    for folder, marker in folders.items():
        if not folder.is_dir():
            hint = (
                "Set SDXL_PIPELINE_PROJECTS to the folder that holds the project folders."
                if marker is None
                else f"Its projects use this storage. Restore it, or, if it was deleted for good, delete {marker}."
            )
            raise PruneError(f"the projects folder {folder} does not exist. {hint}")
        yield from discover_projects(folder)


def _add_invalid_project(found: References, project: InvalidProject) -> None:
    found.projects[project.name] = None
    found.sources = None
    found.notes.append(
        f"project {project.name}: its files have problems (see `sdxl-pipeline doctor {project.name}`), so everything made for it and "
        "every download is retained"
    )


def _add_project(found: References, layout: StorageLayout, project: Project) -> None:
    datasets = (*project.datasets, *project.mask_datasets)
    names = frozenset(dataset.asset_name for dataset in datasets)
    previous = found.projects.get(project.name, frozenset())
    # Two projects of one name in two folders: both count.
    found.projects[project.name] = None if previous is None else names | previous
    for dataset in datasets:
        found.keys.setdefault(layout.latent_store_root(dataset.cache_dir_vae).resolve(), [])
        if dataset.type != "local" and found.sources is not None:
            found.sources.add(data_folder(dataset, layout.sources).parent)
    for entry in project.text_embeds:
        found.keys.setdefault(layout.text_store_root(entry.cache_dir).resolve(), [])
    found.outputs.add(Path(project.training.output_dir))
    training_set = layout.values / project.name / "training_set.json"
    for spec in (training_set, *(Path(project.training.output_dir) / "lora").glob("*/spec.json")):
        found.files.update(_tables_of_spec(spec))


def _manifests(layout: StorageLayout, found: References, project: str) -> Iterator[tuple[str, Path]]:
    """Yield the manifests of a project's datasets: values of assets, and those just written by stages."""
    for stage in _KEY_COLUMNS:
        datasets = [(path, dataset_of(path)) for path in (layout.values / project).glob(f"*_{stage}.json")]
        finished = (layout.work / project).glob(f"*/{stage}/*.finished.json")
        datasets += [(path, path.parents[1].name) for path in finished]
        for path, dataset in datasets:
            if dataset is not None and found.has_dataset(project, dataset):
                yield stage, path


def dataset_of(value: Path) -> str | None:
    """Return the asset name of the dataset that a value belongs to; None for a value that a project has once."""
    for stage in _VALUE_STAGES:
        if value.stem.endswith(f"_{stage}"):
            return value.stem.removesuffix(f"_{stage}")
    return None


def _add_manifest(found: References, stage: str, path: Path) -> None:
    try:
        manifest = json.loads(path.read_bytes())
        root = Path(manifest["store_root"]).resolve()
        tables = [
            Path(manifest[name])
            for name in ("entries_path", "prompts_path")
            if manifest.get(name) is not None
        ]
    except FileNotFoundError:
        return  # being replaced by a newer one
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PruneError(
            f"{path} cannot be read ({error}), so its references are unknown. Delete it, or materialize its asset again."
        ) from error
    keys = found.keys.setdefault(root, [])
    for table in tables:
        found.files.add(table.resolve())
        try:
            column = pq.read_table(table, columns=[_KEY_COLUMNS[stage]])[_KEY_COLUMNS[stage]]
            keys.append(np.unique(pack_keys(column.to_pylist())))
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            # Its entries remain valid, and are found when the stage runs again.
            found.retained_stores.setdefault(
                root, f"{table}, which {path} references, cannot be read: {error}"
            )


def _tables_of_spec(spec: Path) -> Iterator[Path]:
    """Yield every Parquet file that a spec references."""
    try:
        content = json.loads(spec.read_bytes())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise PruneError(f"{spec} cannot be read ({error}). Delete it.") from error
    for text in _strings(content):
        if text.endswith(".parquet"):
            yield Path(text).resolve()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def concatenate_keys(keys: Sequence[np.ndarray] | Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate the packed keys of several tables."""
    return np.concatenate([pack_keys([]), *keys])
