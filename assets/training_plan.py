"""The numbers of the training, checked before anything is encoded: a mistake in them would otherwise show after hours of encoding."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key, project_key, version
from assets.checks.result_checks import OVER_FITTING, check_unseen_images, specs
from assets.errors import user_errors_as_failures
from assets.metadata import appearances_range, markdown_table
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
    """Return `<project>/training_plan`, which the encoders wait for.

    Its data version never changes: that the numbers are others makes no latent and no embedding stale.
    """
    key = project_key(project, "training_plan")
    asked = project.training.model_dump(mode="json", include=SETTINGS)
    weights = [(dataset.id, dataset.repeats, dataset.probability) for dataset in project.datasets]

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        ins={
            dataset.asset_name: dg.AssetIn(
                key=dataset_key(project, dataset, "aspect_buckets"), dagster_type=pd.DataFrame
            )
            for dataset in project.datasets
        },
        code_version=version(CODE, [asked, weights]),
        check_specs=specs(key, may_judge_over_fitting=OVER_FITTING),
        description="Images that train and that are held out, appearances per epoch, steps. Fails before anything is encoded if they do not fit.",
    )
    def training_plan(
        context: dg.AssetExecutionContext, hardware: HardwareProfile, **rows: pd.DataFrame
    ) -> Iterator[Any]:
        profile = hardware.hardware()
        datasets = [
            PlannedDataset(dataset.id, rows[dataset.asset_name], dataset.repeats, dataset.probability)
            for dataset in project.datasets
        ]
        with user_errors_as_failures():
            settings, _ = resolve_settings(project.training, profile, {}, project.folder)
            processes = resolve_hardware(settings, profile).num_processes
            plan = plan_training(datasets, settings, processes)
        context.log.info(f"{plan.steps} steps, {plan.images_per_epoch} images an epoch.")
        yield dg.MaterializeResult(
            value=plan,
            data_version=dg.DataVersion("fits"),
            metadata=_metadata(plan),
            check_results=[check_unseen_images(sum(plan.held_out_images.values()))],
        )

    return training_plan


def _metadata(plan: TrainingPlan) -> dict[str, Any]:
    names = sorted(plan.trained_images.keys() | plan.held_out_images.keys())
    return {
        "steps": plan.steps,
        "batches_per_epoch": plan.batches_per_epoch,
        "images_per_epoch": plan.images_per_epoch,
        "datasets": markdown_table(
            ("dataset", "trained images", "held-out images", "appearances an epoch", "repeats raised to"),
            [
                (
                    name,
                    plan.trained_images.get(name, 0),
                    plan.held_out_images.get(name, 0),
                    appearances_range(plan.appearances.get(name)),
                    plan.raised_repeats.get(name, ""),
                )
                for name in names
            ],
        ),
    }
