"""The asset graph: one module per stage, thin over `sdxl_pipeline`."""

import dagster as dg

from assets.aspect_buckets import build_aspect_buckets
from assets.base_model import build_base_model
from assets.checks.data_checks import build_leak_checks, build_regularisation_checks
from assets.dataset import build_dataset
from assets.evaluation import build_evaluation
from assets.hub_release import build_hub_release
from assets.lora import build_lora
from assets.masks import build_mask_dataset, build_masks
from assets.text_embeds import build_text_embeds
from assets.training_plan import build_training_plan
from assets.vae_latents import build_vae_latents
from sdxl_pipeline.config.loader import InvalidProject, Project


def build_assets(project: Project) -> list[dg.AssetsDefinition]:
    """All assets of one project: a dataset per image dataset, its masks, then the model, its evaluation and its release.

    Among them stand the checks that compare one dataset with others.
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
    return [
        build_base_model(project),
        build_training_plan(project),
        *datasets,
        *(build_mask_dataset(project, entry) for entry in project.mask_datasets),
        *masks,
        *build_leak_checks(project),
        *build_regularisation_checks(project),
        build_lora(project),
        build_evaluation(project),
        build_hub_release(project),
    ]


def build_invalid_project(broken: InvalidProject) -> dg.AssetsDefinition:
    """Stands for a project whose files have problems: the UI shows it, and materializing it says what to mend."""

    @dg.asset(
        key=[broken.name, "project"],
        group_name=broken.name,
        kinds={"json"},
        description=f"This project could not be read.\n\n```\n{broken.error}\n```",
    )
    def project() -> None:
        raise dg.Failure(description=str(broken.error), allow_retries=False)

    return project
