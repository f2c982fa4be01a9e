"""The asset graph: one module per stage, each a thin layer over `sdxl_pipeline`."""

import dagster as dg

from assets.aspect_buckets import build_aspect_buckets
from assets.asset_keys import require_distinct_keys
from assets.base_model import build_base_model
from assets.checks.data_checks import build_leak_checks, build_regularisation_checks
from assets.dataset import build_dataset
from assets.evaluation import build_evaluation
from assets.generated_images import build_generated_images, generates_images
from assets.hub_release import build_hub_release
from assets.lora import build_lora
from assets.masks import build_mask_dataset, build_masks
from assets.text_embeds import build_text_embeds
from assets.training_plan import build_training_plan
from assets.training_set import build_training_set
from assets.vae_latents import build_vae_latents
from sdxl_pipeline.config.loader import InvalidProject, Project


def build_assets(project: Project) -> list[dg.AssetsDefinition]:
    """Return all assets of one project, and the checks that compare its datasets with each other.

    Each image dataset has its own assets, and one for its masks if it has some; model, training plan, LoRA, evaluation and release
    exist once. Raises ProjectError if two of them have one key.
    """
    datasets = [
        build(project, dataset)
        for dataset in project.datasets
        for build in (build_dataset, build_aspect_buckets, build_vae_latents, build_text_embeds)
    ]
    masks = [
        build_masks(project, dataset, entry)
        for dataset in project.datasets
        if (entry := project.masks_of(dataset))
    ]
    definitions = [
        *([build_generated_images(project)] if generates_images(project) else []),
        build_base_model(project),
        build_training_plan(project),
        *datasets,
        *(build_mask_dataset(project, entry) for entry in project.mask_datasets),
        *masks,
        *build_leak_checks(project),
        *build_regularisation_checks(project),
        build_training_set(project),
        build_lora(project),
        build_evaluation(project),
        build_hub_release(project),
    ]
    require_distinct_keys(project, (key for definition in definitions for key in definition.keys))
    return definitions


def build_invalid_project(invalid: InvalidProject) -> dg.AssetsDefinition:
    """Return a placeholder asset for a project with invalid files: its description and its failure list what to fix."""

    @dg.asset(
        key=[invalid.name, "project"],
        group_name=invalid.name,
        kinds={"json"},
        owners=["team:data"],
        description=f"This project's configuration is invalid.\n\n```\n{invalid.error}\n```",
    )
    def project() -> None:
        raise dg.Failure(description=str(invalid.error), allow_retries=False)

    return project
