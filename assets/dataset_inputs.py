"""The inputs that training and evaluation have in common: the datasets' caches, masks, and the base model."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key, project_key
from assets.masks import mask_kind
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import (
    DatasetMasks,
    LatentCache,
    TextEmbedCache,
    TrainingDataset,
    ValidationPrompt,
)

CacheInput: TypeAlias = pd.DataFrame | LatentCache | TextEmbedCache
"""Value of one input of `cache_inputs` or `mask_inputs`."""
InputT = TypeVar("InputT", pd.DataFrame, LatentCache, TextEmbedCache)

STAGES: dict[str, type] = {
    "aspect_buckets": pd.DataFrame,
    "vae_latents": LatentCache,
    "text_embeds": TextEmbedCache,
}


def cache_inputs(project: Project) -> dict[str, dg.AssetIn]:
    """Return the inputs of a stage that reads every dataset, named `<dataset>__<stage>` as `build_training_datasets` reads them."""
    return {
        f"{dataset.asset_name}__{stage}": dg.AssetIn(
            key=dataset_key(project, dataset, stage), dagster_type=STAGES[stage]
        )
        for dataset in project.datasets
        for stage in STAGES
    }


def mask_inputs(project: Project) -> dict[str, dg.AssetIn]:
    """Return the masks of the datasets that have some as inputs named `<dataset>__masks`."""
    return {
        f"{dataset.asset_name}__masks": dg.AssetIn(
            key=dataset_key(project, dataset, "masks"), dagster_type=pd.DataFrame
        )
        for dataset in project.datasets
        if project.masks_of(dataset)
    }


def model_input(project: Project) -> dict[str, dg.AssetIn]:
    """Return the base model as an input named `model`."""
    return {"model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel)}


def build_training_datasets(
    project: Project, storage: Storage, inputs: Mapping[str, CacheInput]
) -> tuple[TrainingDataset, ...]:
    """Return the datasets of a project for a spec, from the loaded `cache_inputs` and, for training, `mask_inputs`."""
    return tuple(_training_dataset(project, dataset, storage, inputs) for dataset in project.datasets)


def _training_dataset(
    project: Project, dataset: ImageDataset, storage: Storage, inputs: Mapping[str, CacheInput]
) -> TrainingDataset:
    rows = _input(inputs, dataset, "aspect_buckets", pd.DataFrame)
    folder = storage.work_dir(project.name, dataset.asset_name, "vae_latents")
    return TrainingDataset(
        dataset_id=dataset.id,
        data_dir=str(storage.data_dir(dataset)),
        latent_cache=dataset.latent_cache,
        text_cache=project.text_cache_of(dataset),
        # every other crop style always gives the same crop
        fresh_crops=dataset.vae_cache_clear_each_epoch and dataset.crop and dataset.crop_style == "random",
        rows_path=str(storage.write_table(rows, folder, "rows")),
        latents=_input(inputs, dataset, "vae_latents", LatentCache),
        text_embeds=_input(inputs, dataset, "text_embeds", TextEmbedCache),
        repeats=dataset.repeats,
        probability=dataset.probability,
        instance_prompt=dataset.instance_prompt,
        masks=_dataset_masks(project, dataset, storage, inputs),
        is_regularisation=dataset.is_regularisation_data,
    )


def _input(
    inputs: Mapping[str, CacheInput], dataset: ImageDataset, stage: str, value_type: type[InputT]
) -> InputT:
    value = inputs[f"{dataset.asset_name}__{stage}"]
    if not isinstance(value, value_type):
        raise TypeError(
            f"input {stage} of {dataset.id} is a {type(value).__name__}, not a {value_type.__name__}"
        )
    return value


def _dataset_masks(
    project: Project, dataset: ImageDataset, storage: Storage, inputs: Mapping[str, CacheInput]
) -> DatasetMasks | None:
    entry = project.masks_of(dataset)
    if entry is None or f"{dataset.asset_name}__masks" not in inputs:
        return None
    pairs = _input(inputs, dataset, "masks", pd.DataFrame)
    folder = storage.work_dir(project.name, dataset.asset_name, "masks")
    return DatasetMasks(
        kind=mask_kind(entry),
        data_dir=str(storage.data_dir(entry)),
        pairs_path=str(storage.write_table(pairs, folder, "masks")),
    )


def validation_prompts(project: Project) -> tuple[ValidationPrompt, ...]:
    """Return the project's prompts for a spec."""
    return tuple(
        ValidationPrompt(name=prompt.name, prompt=prompt.prompt, negative_prompt=prompt.negative_prompt)
        for prompt in project.prompts
    )


def upstream_metadata(
    context: dg.AssetExecutionContext, keys: Iterable[dg.AssetKey], name: str
) -> dict[str, Any]:
    """Return the entry `name` of the latest materialization of each asset that has it, by `/`-joined key."""
    entries = {}
    for key in keys:
        event = context.instance.get_latest_materialization_event(key)
        materialization = event.asset_materialization if event else None
        if materialization and name in materialization.metadata:
            entries["/".join(key.path)] = materialization.metadata[name].value
    return entries
