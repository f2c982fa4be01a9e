"""Any finished run of a project, found by its identity, and what its evaluation and its release need besides its weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from assets.asset_keys import dataset_key
from assets.overrides import RunDifferences
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import TrainedLora, TrainingDataset, TrainingSet, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.finished_runs import MIN_PREFIX_LENGTH, find_run
from sdxl_pipeline.training.checkpoint.run_identity import SPEC_FILE, read_spec

DATA_VERSIONS_FILE = "data_versions.json"
_CROP = ["key", "crop_index", *Crop.__dataclass_fields__]


def select_run(project: Project, current: TrainedLora, prefix: str) -> TrainedLora:
    """Return the finished run whose identity begins with `prefix`, with its overrides; `current` for an empty prefix.

    Raises UserError if there is none, or if its files have changed.
    """
    is_current = len(prefix) >= MIN_PREFIX_LENGTH and current.identity.startswith(prefix)
    if not prefix or prefix == current.identity or is_current:
        return current
    run = find_run(Path(project.training.output_dir), prefix)
    return run.model_copy(update={"overrides": RunDifferences(project, read_training_spec(run)).overrides})


def read_training_spec(lora: TrainedLora) -> TrainSpec:
    """Return the spec that these weights were trained with. Raises UserError if it is missing or of another version."""
    spec = read_spec(Path(lora.run_dir))
    if spec is None:
        raise UserError(
            f"{Path(lora.run_dir) / SPEC_FILE} is missing, or was written by another version of this project. Materialize lora with the "
            f"settings of the run {lora.identity[:16]}; its weights are reused"
        )
    return spec


def require_base_model(run: TrainedLora, trained: TrainSpec, model: ResolvedModel) -> None:
    """Raise UserError if a run was trained on another base model than `model`, whose latents and embeddings the caches contain."""
    if trained.base_model.digest != model.digest:
        raise UserError(
            f"the run {run.identity[:16]} was trained on the base model {trained.base_model.source}, and base_model is now {model.source} with "
            "other files. Restore pretrained_model_name_or_path and materialize base_model and the datasets"
        )


def datasets_of_run(
    run: TrainedLora, trained: TrainSpec, current: TrainingSet
) -> tuple[TrainingDataset, ...]:
    """Return the datasets of a run, whose latents are those of `current`. Images added since the run are left out.

    Raises UserError if a crop of the run has been removed or changed since.
    """
    by_id = {dataset.dataset_id: dataset for dataset in current.datasets}
    for dataset in trained.datasets:
        missing = _missing_crops(dataset, by_id.get(dataset.dataset_id))
        if missing:
            raise UserError(
                f"the run {run.identity[:16]} was trained on images of the dataset {dataset.dataset_id} that its crop plan no longer contains: "
                f"{missing}. Restore them and the dataset's settings, materialize its assets and training_set, then evaluate this run"
            )
    return trained.datasets


def _missing_crops(dataset: TrainingDataset, current: TrainingDataset | None) -> str:
    """Return which crops of `dataset` are not in `current`; an empty string if all are."""
    if current is None or not Path(dataset.rows_path).is_file():
        return "all of them"
    if Path(dataset.rows_path).name == Path(current.rows_path).name:  # named after their content
        return ""
    planned, kept = (pd.read_parquet(each.rows_path, columns=["path", *_CROP]) for each in (dataset, current))
    found = planned.merge(kept[_CROP].drop_duplicates(), on=_CROP, how="left", indicator=True)
    names = found.loc[found["_merge"] == "left_only", "path"].unique()
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_data_versions(run_dir: Path, versions: Mapping[str, str]) -> None:
    """Write the data versions of the datasets' assets into a run's folder, for the lineage of a later release."""
    write_text_atomic(run_dir / DATA_VERSIONS_FILE, json.dumps(versions, indent=1) + "\n")


def data_versions(project: Project, run: TrainedLora, trained: TrainSpec) -> dict[str, str]:
    """Return the data versions of the datasets' assets that a run was trained on, by asset key.

    For a run of an earlier version, only those of latents and embeddings are known.
    """
    path = Path(run.run_dir) / DATA_VERSIONS_FILE
    if path.is_file():
        versions: dict[str, str] = json.loads(path.read_bytes())
        return versions
    by_id = {dataset.id: dataset for dataset in project.datasets}
    return {
        dataset_key(project, by_id[dataset.dataset_id], stage).to_user_string(): digest
        for dataset in trained.datasets
        if dataset.dataset_id in by_id
        for stage, digest in (
            ("vae_latents", dataset.latents.digest),
            ("text_embeds", dataset.text_embeds.digest),
        )
    }
