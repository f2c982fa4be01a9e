"""What the projects refer to: entries of stores by key, tables, downloads. Whatever is in doubt counts as referred to."""

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
_KEY_COLUMNS = {"vae_latents": "latent_key", "text_embeds": "embed_key"}


class PruneError(Exception):
    """Why nothing is freed at all. The message says what to do."""


@dataclass
class References:
    """Everything that is needed, and everything that could not be told."""

    projects: dict[str, frozenset[str] | None] = field(default_factory=dict)
    """Asset names of each project's datasets, by the project's name; None where they cannot be told."""
    keys: dict[Path, list[np.ndarray]] = field(default_factory=dict)
    """Packed keys by root of the store; a store that is not among them belongs to no project."""
    kept_stores: dict[Path, str] = field(default_factory=dict)
    """Stores of which nothing may go, and why."""
    files: set[Path] = field(default_factory=set)
    """Parquet tables that manifests and specs name."""
    outputs: set[Path] = field(default_factory=set)
    """Folders that projects write their runs, evaluations and releases to."""
    sources: set[Path] | None = field(default_factory=set)
    """Folders of downloads; None where they cannot be told."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of what is kept, or goes."""

    def has_dataset(self, project: str, dataset: str) -> bool:
        """Whether a dataset is one of an existing project's."""
        if project not in self.projects:
            return False
        datasets = self.projects[project]
        return datasets is None or dataset in datasets


def references(places: StorageLayout, projects_folder: Path) -> References:
    """What the projects in `projects_folder` refer to, and those of every other folder that has used this storage.

    Raises PruneError when a folder of projects is not there, or a manifest cannot be read: then too little would be known.
    """
    found = References(keys={places.latents.resolve(): [], places.text_embeds.resolve(): []})
    for project in _projects(places, projects_folder):
        if isinstance(project, InvalidProject):
            _note_broken(found, project)
        else:
            _note_settings(found, places, project)
    for name in found.projects:
        for stage, manifest in _manifests(places, found, name):
            _note_manifest(found, stage, manifest)
        for spec in (places.work / name).rglob("*.spec.json"):
            found.files.update(_named_tables(spec))
    return found


def _projects(places: StorageLayout, projects_folder: Path) -> Iterator[Project | InvalidProject]:
    folders = {projects_folder: None} | dict(places.remembered_projects())
    for folder, marker in folders.items():
        if not folder.is_dir():
            hint = (
                "Let SDXL_PIPELINE_PROJECTS name the folder that holds the project folders."
                if marker is None
                else f"Its projects keep things here. Bring it back, or, if it is gone for good, delete {marker}."
            )
            raise PruneError(f"there is no folder of projects {folder}. {hint}")
        yield from discover_projects(folder)


def _note_broken(found: References, project: InvalidProject) -> None:
    found.projects[project.name] = None
    found.sources = None
    found.notes.append(
        f"project {project.name}: its files hold problems (see `sdxl-pipeline doctor {project.name}`), so all that was made for it is "
        "kept, and every download"
    )


def _note_settings(found: References, places: StorageLayout, project: Project) -> None:
    datasets = (*project.datasets, *project.mask_datasets)
    names = frozenset(dataset.asset_name for dataset in datasets)
    others = found.projects.get(project.name, frozenset())
    # Of two projects of one name, in two folders, both are meant.
    found.projects[project.name] = None if others is None else names | others
    for dataset in datasets:
        found.keys.setdefault(places.latent_store_root(dataset).resolve(), [])
        if dataset.type != "local" and found.sources is not None:
            found.sources.add(data_folder(dataset, places.sources).parent)
    for entry in project.text_embeds:
        found.keys.setdefault(places.text_store_root(entry).resolve(), [])
    found.outputs.add(Path(project.training.output_dir))
    for spec in (Path(project.training.output_dir) / "lora").glob("*/spec.json"):
        found.files.update(_named_tables(spec))


def _manifests(places: StorageLayout, found: References, project: str) -> Iterator[tuple[str, Path]]:
    """The manifests that a project's datasets hand on, and those that its stages have just finished."""
    for stage in _KEY_COLUMNS:
        for path in (
            *(places.values / project).glob(f"*/{stage}.json"),
            *(places.work / project).glob(f"*/{stage}/*.finished.json"),
        ):
            dataset = path.relative_to(places.values if path.is_relative_to(places.values) else places.work)
            if found.has_dataset(project, dataset.parts[1]):
                yield stage, path


def _note_manifest(found: References, stage: str, path: Path) -> None:
    try:
        manifest = json.loads(path.read_bytes())
        root = Path(manifest["store_root"]).resolve()
        tables = [
            Path(manifest[name])
            for name in ("entries_path", "prompts_path")
            if manifest.get(name) is not None
        ]
    except FileNotFoundError:
        return  # just being replaced by a newer one
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PruneError(
            f"{path} cannot be read ({error}), so what it refers to is not known. Delete it, or materialize its asset again."
        ) from error
    keys = found.keys.setdefault(root, [])
    for table in tables:
        found.files.add(table.resolve())
        try:
            column = pq.read_table(table, columns=[_KEY_COLUMNS[stage]])[_KEY_COLUMNS[stage]]
            keys.append(np.unique(pack_keys(column.to_pylist())))
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            # Its entries are still good, and found again when the stage runs again.
            found.kept_stores.setdefault(root, f"{table}, which {path} names, cannot be read: {error}")


def _named_tables(spec: Path) -> Iterator[Path]:
    """Every Parquet file that a spec names."""
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


def packed(keys: Sequence[np.ndarray] | Iterable[np.ndarray]) -> np.ndarray:
    """Packed keys of several tables as one array."""
    return np.concatenate([pack_keys([]), *keys])
