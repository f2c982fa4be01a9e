"""What every stage after the caches needs of the datasets: the graph's edges to them, and their datasets as a spec holds them."""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key, project_key
from assets.masks import kind_of
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

STAGES: dict[str, type] = {
    "aspect_buckets": pd.DataFrame,
    "vae_latents": LatentCache,
    "text_embeds": TextEmbedCache,
}


def cache_inputs(project: Project) -> dict[str, dg.AssetIn]:
    """Inputs of a stage that reads every dataset, by the names `build_training_datasets` takes them back from."""
    return {
        f"{dataset.asset_name}__{stage}": dg.AssetIn(
            key=dataset_key(project, dataset, stage), dagster_type=STAGES[stage]
        )
        for dataset in project.datasets
        for stage in STAGES
    }


def mask_inputs(project: Project) -> dict[str, dg.AssetIn]:
    """The masks of the datasets that have some, by the names `build_training_datasets` takes them back from."""
    return {
        f"{dataset.asset_name}__masks": dg.AssetIn(
            key=dataset_key(project, dataset, "masks"), dagster_type=pd.DataFrame
        )
        for dataset in project.datasets
        if project.masks_of(dataset)
    }


def model_input(project: Project) -> dict[str, dg.AssetIn]:
    """The base model as an input named `model`."""
    return {"model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel)}


def build_training_datasets(
    project: Project, storage: Storage, inputs: Mapping[str, Any]
) -> tuple[TrainingDataset, ...]:
    """The datasets of a project as specs hold them, from the loaded `cache_inputs` and, where masks matter, `mask_inputs`."""
    return tuple(
        TrainingDataset(
            dataset_id=dataset.id,
            data_dir=str(storage.data_dir(dataset)),
            latent_cache=dataset.latent_cache,
            text_cache=project.text_cache_of(dataset),
            # any other crop has but one place
            fresh_crops=dataset.vae_cache_clear_each_epoch
            and dataset.crop
            and dataset.crop_style == "random",
            rows_path=str(
                storage.keep_table(
                    inputs[f"{dataset.asset_name}__aspect_buckets"],
                    storage.work_dir(project.name, dataset.asset_name, "vae_latents"),
                    "rows",
                )
            ),
            latents=inputs[f"{dataset.asset_name}__vae_latents"],
            text_embeds=inputs[f"{dataset.asset_name}__text_embeds"],
            repeats=dataset.repeats,
            probability=dataset.probability,
            instance_prompt=dataset.instance_prompt,
            masks=_dataset_masks(project, dataset, storage, inputs),
            is_regularisation=dataset.is_regularisation_data,
        )
        for dataset in project.datasets
    )


def _dataset_masks(
    project: Project, dataset: ImageDataset, storage: Storage, inputs: Mapping[str, Any]
) -> DatasetMasks | None:
    entry, pairs = project.masks_of(dataset), inputs.get(f"{dataset.asset_name}__masks")
    if entry is None or pairs is None:
        return None
    folder = storage.work_dir(project.name, dataset.asset_name, "masks")
    return DatasetMasks(
        kind=kind_of(entry),
        data_dir=str(storage.data_dir(entry)),
        pairs_path=str(storage.keep_table(pairs, folder, "masks")),
    )


def validation_prompts(project: Project) -> tuple[ValidationPrompt, ...]:
    """The project's prompts as specs hold them."""
    return tuple(
        ValidationPrompt(name=prompt.name, prompt=prompt.prompt, negative_prompt=prompt.negative_prompt)
        for prompt in project.prompts
    )


def upstream_metadata(
    context: dg.AssetExecutionContext, keys: Iterable[dg.AssetKey], name: str
) -> dict[str, Any]:
    """One metadata entry of the latest materialization of each asset that has it, by `/`-joined key."""
    found = {}
    for key in keys:
        event = context.instance.get_latest_materialization_event(key)
        materialization = event.asset_materialization if event else None
        if materialization and name in materialization.metadata:
            found["/".join(key.path)] = materialization.metadata[name].value
    return found
