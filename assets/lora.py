"""The training: one LoRA per identity of inputs and settings; an interrupted run is resumed and a finished one reused."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.asset_keys import asset_attributes, project_key, version
from assets.checks import result_checks
from assets.dataset_inputs import model_input, validation_prompts
from assets.errors import USER_ERRORS, user_errors_as_failures
from assets.metadata import lora_metadata, lora_summary
from assets.training_set import training_set_input
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
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, project_fingerprint
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.models.adapters.init_adapter_source import resolve_init_lora
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import SettingDifference, TrainedLora, TrainingSet, TrainSpec
from sdxl_pipeline.training.checkpoint.run_identity import (
    SPEC_FILE,
    change_affects_weights,
    run_identity,
    setting_changes,
    settings_affecting_weights,
)

CODE = "1"


class TrainRunConfig(dg.Config):
    """Settings of one run that override config.json."""

    settings: dict[str, Any] = Field(
        default={},
        description="Keys of config.json with the values that this run uses instead of the configured ones.",
    )


def build_lora(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/lora`; its data version is the digest of the weights, so downstream assets are stale exactly when they change."""
    key = project_key(project, "lora")

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "torch", "safetensors", device=True),
        ins=model_input(project) | training_set_input(project),
        code_version=version(
            CODE,
            [
                settings_affecting_weights(project.training),
                project.training.model_dump(mode="json", include=keys_used_by(TrainingSettings, "lora")),
            ],
        ),
        check_specs=[check.spec(key) for check in result_checks.LORA_CHECKS],
        description="The trained LoRA. `settings` in the launchpad overrides keys of config.json for one run.",
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
        training_set: TrainingSet,
    ) -> Iterator[dg.MaterializeResult[TrainedLora]]:
        profile = hardware.hardware()
        with user_errors_as_failures():
            settings, _ = resolve_settings(
                trackers.apply(project.training), profile, config.settings, project.folder
            )
            settings = resolve_init_lora(settings, project.folder)
        if settings.push_to_hub and settings.hub_model_id:
            # Fail before training if the token cannot push.
            hub.check_can_push(settings.hub_model_id)
        spec = TrainSpec(
            base_model=model,
            hardware=resolve_hardware(settings, profile),
            settings=settings,
            datasets=training_set.datasets,
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
        differences, overrides = _setting_differences(project, spec, identity)
        result = launcher.run_stage(
            context,
            "train",
            spec,
            TrainedLora,
            storage.work_dir(project.name, "lora"),
            spec.hardware,
            trackers.environment() | webhook.environment(settings) | hub.environment(),
        )
        result = result.model_copy(update={"overrides": overrides})
        context.log.info(lora_summary(result))
        yield dg.MaterializeResult(
            value=result,
            data_version=dg.DataVersion(result.weights_sha256),
            metadata=lora_metadata(result, spec, differences)
            | {
                METADATA_ENTRY: project_fingerprint(
                    project, training_set.fingerprints, {each.setting: each.used for each in overrides}
                )
            },
            # Dagster records the code version of the definition, which does not include overrides; this tag replaces it, so that
            # the UI marks weights that config.json does not describe as stale.
            tags={"dagster/code_version": version(CODE, [identity, result.released_weights])}
            if overrides
            else None,
            check_results=result_checks.check_lora(result, model, settings),
        )

    return lora


def read_training_spec(lora: TrainedLora) -> TrainSpec:
    """Return the spec that these weights were trained with."""
    return TrainSpec.model_validate_json((Path(lora.run_dir) / SPEC_FILE).read_text(encoding="utf-8"))


def _setting_differences(
    project: Project, spec: TrainSpec, identity: str
) -> tuple[tuple[SettingDifference, ...], tuple[SettingDifference, ...]]:
    """Return the settings of a run that differ from the configured ones, and the subset of them that changes the weights.

    The configured ones are config.json on the hardware profile that this process's environment selects.
    """
    settings, hardware = project.training, spec.hardware
    # If the configuration cannot be resolved, every resolved value counts as a difference from it.
    with suppress(*USER_ERRORS, dg.Failure):
        profile = HardwareProfile().hardware()
        settings, _ = resolve_settings(settings, profile, {}, project.folder)
        settings = resolve_init_lora(settings, project.folder)
        hardware = resolve_hardware(settings, profile)
    configured = spec.model_copy(update={"settings": settings, "hardware": hardware})
    differences = {
        key: SettingDifference(setting=key, configured=json.dumps(before), used=json.dumps(after))
        for key, (before, after) in setting_changes(configured, spec).items()
    }
    selecting = ("resume_from_checkpoint", *(["released_weights"] if spec.settings.use_ema else []))
    decisive = [key for key in differences if change_affects_weights(key) or key in selecting]
    if decisive and set(decisive) <= {"init_lora", "resume_from_checkpoint"}:
        # Two paths may point to one file, and resuming from a checkpoint of the same trajectory gives the same weights.
        with suppress(*USER_ERRORS):
            if run_identity(configured) == identity:
                decisive = []
    return tuple(differences.values()), tuple(differences[key] for key in decisive)
