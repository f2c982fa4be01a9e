"""The training: one LoRA per identity of inputs and settings, resumed when it was interrupted, reused when it is finished."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.asset_keys import GPU_POOL, dataset_key, project_key, version
from assets.checks import result_checks
from assets.dataset_inputs import (
    build_training_datasets,
    cache_inputs,
    mask_inputs,
    model_input,
    upstream_metadata,
    validation_prompts,
)
from assets.errors import USER_ERRORS, user_errors_as_failures
from assets.metadata import appearances_range, drop_none, inline_image, markdown_table
from resources.hardware import HardwareProfile
from resources.hub import HubResource
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from resources.trackers import TrackerResource
from resources.webhook import WebhookResource
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware, resolve_settings
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, OVERRIDES_ENTRY, project_fingerprint
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.models.adapters.init_adapter_source import initial_adapter_digest, with_initial_adapter
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.release_inputs import adapter_name
from sdxl_pipeline.runtime.specs import SettingDifference, TrainedLora, TrainingDataset, TrainSpec
from sdxl_pipeline.training.checkpoint.run_identity import (
    decides_weights,
    run_identity,
    setting_changes,
    settings_affecting_weights,
)
from sdxl_pipeline.training.checkpoint.run_lineage import SPEC_FILE

CODE = "1"


class TrainRunConfig(dg.Config):
    """What may be changed for one run, above config.json."""

    settings: dict[str, Any] = Field(
        default={}, description="Keys of config.json with the values that this run uses instead."
    )


def build_lora(project: Project) -> dg.AssetsDefinition:
    """`<project>/lora`; its data version is the digest of the weights, so what follows is stale exactly when they change."""
    key = project_key(project, "lora")

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"torch", "safetensors"},
        pool=GPU_POOL,
        ins=model_input(project) | cache_inputs(project) | mask_inputs(project),
        code_version=version(
            CODE,
            [
                settings_affecting_weights(project.training),
                project.training.model_dump(mode="json", include=keys_used_by(TrainingSettings, "lora")),
            ],
        ),
        check_specs=result_checks.lora_specs(key),
        description="The trained LoRA. `settings` in the launchpad replaces keys of config.json for one run.",
    )
    def lora(
        context: dg.AssetExecutionContext,
        config: TrainRunConfig,
        hardware: HardwareProfile,
        launcher: LocalStageClient,
        storage: Storage,
        hub: HubResource,
        trackers: TrackerResource,
        webhook: WebhookResource,
        model: ResolvedModel,
        **datasets: Any,
    ) -> Iterator[Any]:
        profile = hardware.hardware()
        with user_errors_as_failures():
            settings, _ = resolve_settings(
                trackers.apply(project.training), profile, config.settings, project.folder
            )
            settings = with_initial_adapter(settings, project.folder)
        if settings.push_to_hub and settings.hub_model_id:
            # Hours of training must not end at a door that was closed from the beginning.
            hub.check_can_push(settings.hub_model_id)
        spec = TrainSpec(
            base_model=model,
            hardware=resolve_hardware(settings, profile),
            settings=settings,
            datasets=build_training_datasets(project, storage, datasets),
            prompts=validation_prompts(project),
            run_dir="",
            project=project.name,
        )
        with user_errors_as_failures():
            identity = run_identity(spec)
            run_dir = Path(settings.output_dir) / "lora" / identity[:16]
            spec = spec.model_copy(update={"run_dir": str(run_dir)})
            run_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomic(run_dir / SPEC_FILE, spec.model_dump_json(indent=1))
        differences, overrides = _differences(project, spec, identity)
        result = launcher.run(
            context,
            "train",
            spec,
            TrainedLora,
            storage.work_dir(project.name, "lora"),
            spec.hardware,
            trackers.environment() | webhook.environment(settings) | hub.environment(),
        )
        result = result.model_copy(update={"overrides": overrides})
        context.log.info(_summary(result))
        seen = upstream_metadata(
            context,
            (
                dataset_key(project, dataset, "dataset")
                for dataset in (*project.datasets, *project.mask_datasets)
            ),
            METADATA_ENTRY,
        )
        yield dg.MaterializeResult(
            value=result,
            data_version=dg.DataVersion(result.weights_sha256),
            metadata=_metadata(result)
            | _uses(spec.datasets)
            | _objective(settings)
            | _adapter(settings)
            | _trained_with(differences, overrides)
            | {
                METADATA_ENTRY: project_fingerprint(
                    project, seen, {each.setting: each.used for each in overrides}
                )
            },
            # Dagster records the code version of the definition, which knows no overrides; this tag replaces it, so that the UI
            # shows weights that config.json does not describe as stale.
            tags={"dagster/code_version": version(CODE, [identity, result.released_weights])}
            if overrides
            else None,
            check_results=result_checks.check_lora(result, model, settings),
        )

    return lora


def read_training_spec(lora: TrainedLora) -> TrainSpec:
    """The spec that made these weights."""
    return TrainSpec.model_validate_json((Path(lora.run_dir) / SPEC_FILE).read_text(encoding="utf-8"))


def _differences(
    project: Project, spec: TrainSpec, identity: str
) -> tuple[tuple[SettingDifference, ...], tuple[SettingDifference, ...]]:
    """Return the settings of a run that differ from the configured ones, and of these the ones that make its weights differ.

    Configured is config.json on the hardware profile that this process's environment names.
    """
    settings, hardware = project.training, spec.hardware
    # A configuration that cannot be resolved describes no weights: then everything that it does not state itself differs.
    with suppress(*USER_ERRORS, dg.Failure):
        profile = HardwareProfile().hardware()
        settings, _ = resolve_settings(settings, profile, {}, project.folder)
        settings = with_initial_adapter(settings, project.folder)
        hardware = resolve_hardware(settings, profile)
    configured = spec.model_copy(update={"settings": settings, "hardware": hardware})
    differences = {
        key: SettingDifference(setting=key, configured=json.dumps(before), used=json.dumps(after))
        for key, (before, after) in setting_changes(configured, spec).items()
    }
    chosen = ("resume_from_checkpoint", *(["released_weights"] if spec.settings.use_ema else []))
    decisive = [key for key in differences if decides_weights(key) or key in chosen]
    if decisive and set(decisive) <= {"init_lora", "resume_from_checkpoint"}:
        # two paths may lead to one file, and a checkpoint of the same trajectory to the same weights
        with suppress(*USER_ERRORS):
            if run_identity(configured) == identity:
                decisive = []
    return tuple(differences.values()), tuple(differences[key] for key in decisive)


def _trained_with(
    differences: Sequence[SettingDifference], overrides: Sequence[SettingDifference]
) -> dict[str, Any]:
    """Return the table of `_differences`, and the names of those that count."""
    rows = [
        (f"`{each.setting}`", each.configured, each.used, "yes" if each in overrides else "no")
        for each in differences
    ]
    header = ("setting", "configured", "this run", "changes the weights")
    return drop_none(
        {
            "trained_with": markdown_table(header, rows) if rows else None,
            OVERRIDES_ENTRY: ", ".join(each.setting for each in overrides) or None,
        }
    )


def _uses(datasets: Sequence[TrainingDataset]) -> dict[str, Any]:
    """The datasets that are masked, and those that are regularisation."""
    masked = ", ".join(dataset.dataset_id for dataset in datasets if dataset.masks)
    preserved = ", ".join(dataset.dataset_id for dataset in datasets if dataset.is_regularisation)
    return drop_none({"masked_datasets": masked or None, "regularisation_datasets": preserved or None})


def _objective(settings: TrainingSettings) -> dict[str, Any]:
    """What is taught other than by default."""
    changed = [(key, str(value)) for key, value in settings.changed_objective.items()]
    return drop_none({"objective": markdown_table(("setting", "value"), changed) if changed else None})


def _summary(result: TrainedLora) -> str:
    if result.reused:
        return f"These inputs and settings were trained before ({result.identity[:12]}): reused, nothing trained."
    resumed = "" if result.resumed_from_step is None else f", resumed from step {result.resumed_from_step}"
    return f"{result.steps} steps in {result.seconds:.0f} s{resumed}, final loss {result.final_loss:.4f}."


def _memory(result: TrainedLora) -> dg.MetadataValue | None:
    """The estimate from before the first step beside what was measured."""
    if result.estimated_memory_bytes is None:
        return None
    rows = [(name, size / 2**30) for name, size in result.memory_estimate.items()]
    peaks = [
        ("**estimated, at one time**", result.estimated_memory_bytes / 2**30),
        ("**measured peak**", result.peak_memory_bytes / 2**30),
    ]
    return markdown_table(("memory of the main process", "GiB"), [*rows, *peaks])


def _adapter(settings: TrainingSettings) -> dict[str, Any]:
    if settings.model_type != "lora":
        return {}
    start = initial_adapter_digest(settings.init_lora)
    return drop_none({"adapter": adapter_name(settings).partition(" ")[2], "started_from_sha256": start})


def _metadata(result: TrainedLora) -> dict[str, Any]:
    sheet = result.validation_sheet_path
    return drop_none(
        {
            "summary": _summary(result),
            "final_loss": result.final_loss,
            "eval_loss": result.eval_losses[-1][1] if result.eval_losses else None,
            "eval_losses": markdown_table(("step", "eval loss"), result.eval_losses)
            if result.eval_losses
            else None,
            "steps": result.steps,
            "skipped_steps": result.skipped_steps or None,
            "begun_from": f"step {result.ancestor.step} of the run {result.ancestor.identity[:16]}"
            if result.ancestor
            else None,
            "epochs": result.epochs,
            "images_seen": result.samples,
            "datasets": markdown_table(
                (
                    "dataset",
                    "trained images",
                    "held-out images",
                    "images an epoch",
                    "appearances an epoch",
                    "crops an image",
                    "repeats raised to",
                ),
                [
                    (
                        name,
                        result.trained_images.get(name, ""),
                        result.held_out_images.get(name, 0),
                        f"{images:,.0f}",
                        appearances_range(result.appearances.get(name)),
                        result.crops_per_image[name],
                        result.raised_repeats.get(name, ""),
                    )
                    for name, images in sorted(result.images_per_epoch.items())
                ],
            )
            if result.images_per_epoch
            else None,
            "steps_per_second": result.steps_per_second,
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "memory": _memory(result),
            "trainable_parameters": result.trainable_parameters,
            "adapted_modules": result.adapted_modules,
            "loss_curve": inline_image(
                result.loss_curve_path, "loss, gradient norm and learning rate over steps"
            ),
            "validation": inline_image(sheet, "validation images over steps") if sheet else None,
            "weights": dg.MetadataValue.path(result.weights_path),
            "kohya_weights": dg.MetadataValue.path(result.kohya_path) if result.kohya_path else None,
            "kohya_dtype": result.kohya_dtype,
            "dora_approximation": markdown_table(
                ("approximation as a plain LoRA", "value"), sorted(result.dora_approximation.items())
            )
            if result.dora_approximation
            else None,
            "released_weights": result.released_weights,
            "metrics": dg.MetadataValue.path(result.metrics_path),
            "sha256": result.weights_sha256,
            "identity": result.identity,
        }
    )
