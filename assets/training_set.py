"""The training set: the datasets of a project joined into one value, which training, evaluation and release read."""

from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypeVar

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, project_key, version
from assets.masks import mask_kind, masks_digest
from assets.metadata import training_set_metadata
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, dataset_digest, rows_digest
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.specs import (
    DatasetMasks,
    LatentCache,
    TextEmbedCache,
    TrainingDataset,
    TrainingSet,
)

CODE = "1"

DatasetInput: TypeAlias = pd.DataFrame | LatentCache | TextEmbedCache
InputT = TypeVar("InputT", pd.DataFrame, LatentCache, TextEmbedCache)

STAGES: dict[str, type] = {
    "dataset": pd.DataFrame,
    "aspect_buckets": pd.DataFrame,
    "vae_latents": LatentCache,
    "text_embeds": TextEmbedCache,
}


def build_training_set(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/training_set`; its data version contains what the datasets contain, and none of their paths."""
    datasets = [_sampling_settings(project, dataset) for dataset in project.datasets]

    @dg.asset(
        key=project_key(project, "training_set"),
        **asset_attributes(project, "training", "pandas"),
        ins=_inputs(project),
        code_version=version(CODE, datasets),
        description="All datasets of the project as the training reads them: crop plans, latents, embeddings, masks, repeats.",
    )
    def training_set(
        context: dg.AssetExecutionContext, storage: Storage, **inputs: DatasetInput
    ) -> Iterator[dg.MaterializeResult[TrainingSet]]:
        value = TrainingSet(
            datasets=tuple(_training_dataset(project, each, storage, inputs) for each in project.datasets),
            fingerprints=_fingerprints(project, inputs),
            data_versions=_data_versions(project, inputs),
        )
        yield dg.MaterializeResult(
            value=value,
            data_version=dg.DataVersion(digest_json([value.data_versions, datasets])),
            metadata=training_set_metadata(value),
        )

    return training_set


def _inputs(project: Project) -> dict[str, dg.AssetIn]:
    """Return an input `<dataset>_<stage>` for each stage of each dataset, including masks and their files."""
    stages = [(dataset, stage, STAGES[stage]) for dataset in project.datasets for stage in STAGES]
    stages += [(each, "masks", pd.DataFrame) for each in project.datasets if project.masks_of(each)]
    stages += [(entry, "dataset", pd.DataFrame) for entry in project.mask_datasets]
    return {
        dataset.stage_name(stage): dg.AssetIn(
            key=dataset_key(project, dataset, stage), dagster_type=value_type
        )
        for dataset, stage, value_type in stages
    }


def _input(
    inputs: Mapping[str, DatasetInput], dataset: ImageDataset, stage: str, value_type: type[InputT]
) -> InputT:
    value = inputs[dataset.stage_name(stage)]
    if not isinstance(value, value_type):
        raise TypeError(
            f"input {stage} of {dataset.id} is a {type(value).__name__}, not a {value_type.__name__}"
        )
    return value


def _sampling_settings(project: Project, dataset: ImageDataset) -> dict[str, object]:
    """Return the fields of a dataset's TrainingDataset that are settings."""
    return {
        "dataset_id": dataset.id,
        "latent_cache": dataset.latent_cache,
        "text_cache": project.text_cache_of(dataset),
        # every other crop style always gives the same crop
        "fresh_crops": dataset.vae_cache_clear_each_epoch and dataset.crop and dataset.crop_style == "random",
        "repeats": dataset.repeats,
        "probability": dataset.probability,
        "instance_prompt": dataset.instance_prompt,
        "is_regularisation": dataset.is_regularisation_data,
    }


def _training_dataset(
    project: Project, dataset: ImageDataset, storage: Storage, inputs: Mapping[str, DatasetInput]
) -> TrainingDataset:
    rows = _input(inputs, dataset, "aspect_buckets", pd.DataFrame)
    folder = storage.work_dir(project.name, dataset.asset_name, "vae_latents")
    return TrainingDataset.model_validate(
        _sampling_settings(project, dataset)
        | {
            "data_dir": str(storage.data_dir(dataset)),
            "rows_path": str(storage.write_table(rows, folder, "rows")),
            "latents": _input(inputs, dataset, "vae_latents", LatentCache),
            "text_embeds": _input(inputs, dataset, "text_embeds", TextEmbedCache),
            "masks": _dataset_masks(project, dataset, storage, inputs),
        }
    )


def _dataset_masks(
    project: Project, dataset: ImageDataset, storage: Storage, inputs: Mapping[str, DatasetInput]
) -> DatasetMasks | None:
    entry = project.masks_of(dataset)
    if entry is None:
        return None
    pairs = _input(inputs, dataset, "masks", pd.DataFrame)
    folder = storage.work_dir(project.name, dataset.asset_name, "masks")
    return DatasetMasks(
        kind=mask_kind(entry),
        data_dir=str(storage.data_dir(entry)),
        pairs_path=str(storage.write_table(pairs, folder, "masks")),
    )


def _fingerprints(project: Project, inputs: Mapping[str, DatasetInput]) -> dict[str, str]:
    """Return the fingerprints of the files that the datasets were read from, by the key of their dataset asset."""
    fingerprints = {}
    for dataset in (*project.datasets, *project.mask_datasets):
        key = dataset_key(project, dataset, "dataset").to_user_string()
        attrs = _input(inputs, dataset, "dataset", pd.DataFrame).attrs
        if METADATA_ENTRY not in attrs:
            raise dg.Failure(
                f"the value of asset {key} was written by another version of this project. Materialize it again: "
                f"dagster asset materialize -m sdxl_pipeline.definitions --select 'key:\"{key}\"'",
                allow_retries=False,
            )
        fingerprints[key] = str(attrs[METADATA_ENTRY])
    return fingerprints


def _data_versions(project: Project, inputs: Mapping[str, DatasetInput]) -> dict[str, str]:
    """Return the data version of each dataset's assets, computed from their values, by `/`-joined key."""
    versions: dict[str, str] = {}
    for dataset in project.datasets:
        found = {
            "dataset": dataset_digest(_input(inputs, dataset, "dataset", pd.DataFrame)),
            "aspect_buckets": rows_digest(_input(inputs, dataset, "aspect_buckets", pd.DataFrame)),
            "vae_latents": _input(inputs, dataset, "vae_latents", LatentCache).digest,
            "text_embeds": _input(inputs, dataset, "text_embeds", TextEmbedCache).digest,
        }
        if entry := project.masks_of(dataset):
            found["masks"] = masks_digest(mask_kind(entry), _input(inputs, dataset, "masks", pd.DataFrame))
        versions |= {
            dataset_key(project, dataset, stage).to_user_string(): digest for stage, digest in found.items()
        }
    return versions
