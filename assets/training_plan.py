"""Batch, step and epoch counts of the training, validated before anything is encoded."""

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, project_key, version
from assets.checks.result_checks import ENOUGH_EVAL_IMAGES, check_eval_images
from assets.event_log import user_errors_as_failures
from assets.metadata import training_plan_metadata
from resources.hardware import HardwareProfile
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware, resolve_settings
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import TrainingPlan
from sdxl_pipeline.training.data.training_plan import PlannedDataset, plan_training

CODE = "1"
SETTINGS = keys_used_by(TrainingSettings, "training_plan")


def build_training_plan(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/training_plan`, upstream of the encoders.

    Its data version is constant: a change of the counts does not make latents or embeddings stale.
    """
    key = project_key(project, "training_plan")
    settings_read = project.training.model_dump(mode="json", include=SETTINGS)
    weights = [(dataset.id, dataset.repeats, dataset.probability) for dataset in project.datasets]

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "pandas"),
        ins={
            dataset.stage_name("aspect_buckets"): dg.AssetIn(
                key=dataset_key(project, dataset, "aspect_buckets"), dagster_type=pd.DataFrame
            )
            for dataset in project.datasets
        },
        code_version=version(CODE, [settings_read, weights]),
        check_specs=[ENOUGH_EVAL_IMAGES.spec(key)],
        description="Trained and held-out images, appearances per epoch, steps. Fails before anything is encoded if the counts are inconsistent.",
    )
    def training_plan(
        context: dg.AssetExecutionContext, hardware: HardwareProfile, **rows: pd.DataFrame
    ) -> Iterator[dg.MaterializeResult[TrainingPlan]]:
        profile = hardware.hardware()
        datasets = [
            PlannedDataset(
                dataset.id, rows[dataset.stage_name("aspect_buckets")], dataset.repeats, dataset.probability
            )
            for dataset in project.datasets
        ]
        with user_errors_as_failures():
            settings, _ = resolve_settings(project.training, profile, {}, project.folder)
            processes = resolve_hardware(settings, profile).num_processes
            plan = plan_training(datasets, settings, processes, settings.allow_dataset_oversubscription)
        context.log.info(f"{plan.steps} steps, {plan.images_per_epoch} images per epoch.")
        yield dg.MaterializeResult(
            value=plan,
            data_version=dg.DataVersion("fits"),
            metadata=training_plan_metadata(plan),
            check_results=[check_eval_images(sum(plan.held_out_images.values()))],
        )

    return training_plan
