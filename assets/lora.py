"""The training: one LoRA per identity of inputs and settings; an interrupted run is resumed and a finished one reused."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.asset_keys import asset_attributes, model_input, project_key, training_set_input, version
from assets.checks import result_checks
from assets.event_log import USER_ERRORS, user_errors_as_failures
from assets.metadata import appearances_range, drop_none, inline_image, markdown_table
from assets.stage_asset import StageAsset
from resources.hardware import HardwareProfile
from resources.hub import HubResource
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from resources.trackers import TrackerResource
from resources.webhook import WebhookResource
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware, resolve_settings
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, OVERRIDES_ENTRY, project_fingerprint
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.models.adapters.init_adapter_source import initial_adapter_digest, resolve_init_lora
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.release_inputs import adapter_name
from sdxl_pipeline.runtime.specs import (
    SettingDifference,
    TrainedLora,
    TrainingSet,
    TrainSpec,
    ValidationPrompt,
)
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


@dataclass(frozen=True)
class LoraTraining(StageAsset[TrainSpec, TrainedLora]):
    """The training of a LoRA in the run directory of its identity. `settings` are those of the run, with its overrides."""

    stage = "train"
    manifest_type = TrainedLora
    project: Project
    work_dir: Path
    profile: Hardware
    settings: TrainingSettings
    model: ResolvedModel
    training_set: TrainingSet

    def build_spec(self) -> TrainSpec:
        """Return the spec, with the run directory that its identity gives."""
        spec = TrainSpec(
            base_model=self.model,
            hardware=resolve_hardware(self.settings, self.profile),
            settings=self.settings,
            datasets=self.training_set.datasets,
            prompts=validation_prompts(self.project),
            run_dir="",
            project=self.project.name,
        )
        run_dir = Path(self.settings.output_dir) / "lora" / run_identity(spec)[:16]
        return spec.model_copy(update={"run_dir": str(run_dir)})

    def write_spec(self) -> None:
        """Write the spec into the run directory, where evaluation and release read it."""
        run_dir = Path(self.spec.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(run_dir / SPEC_FILE, self.spec.model_dump_json(indent=1))

    @cached_property
    def configured(self) -> TrainSpec:
        """Return the spec that config.json describes, on the hardware profile that this process's environment selects."""
        settings, hardware = self.project.training, self.spec.hardware
        # If the configuration cannot be resolved, every resolved value counts as a difference from it.
        with suppress(*USER_ERRORS, dg.Failure):
            profile = HardwareProfile().hardware()
            settings, _ = resolve_settings(settings, profile, {}, self.project.folder)
            settings = resolve_init_lora(settings, self.project.folder)
            hardware = resolve_hardware(settings, profile)
        return self.spec.model_copy(update={"settings": settings, "hardware": hardware})

    @cached_property
    def differences(self) -> dict[str, SettingDifference]:
        """Return the settings that differ from the configured ones, by name."""
        return {
            key: SettingDifference(setting=key, configured=json.dumps(before), used=json.dumps(after))
            for key, (before, after) in setting_changes(self.configured, self.spec).items()
        }

    @cached_property
    def overrides(self) -> tuple[SettingDifference, ...]:
        """Return those of `differences` that change the weights."""
        selecting = ("resume_from_checkpoint", *(["released_weights"] if self.settings.use_ema else []))
        decisive = [key for key in self.differences if change_affects_weights(key) or key in selecting]
        if decisive and set(decisive) <= {"init_lora", "resume_from_checkpoint"}:
            # Two paths may point to one file, and resuming from a checkpoint of the same trajectory gives the same weights.
            with suppress(*USER_ERRORS):
                if run_identity(self.configured) == run_identity(self.spec):
                    return ()
        return tuple(self.differences[key] for key in decisive)

    def complete(self, manifest: TrainedLora) -> TrainedLora:
        """Return the manifest with the overrides."""
        return manifest.model_copy(update={"overrides": self.overrides})

    def summary(self, result: TrainedLora) -> str:
        """Return what was trained, resumed or reused."""
        if result.reused:
            return f"These inputs and settings were trained before ({result.identity[:12]}): reused, nothing trained."
        resumed = (
            "" if result.resumed_from_step is None else f", resumed from step {result.resumed_from_step}"
        )
        return f"{result.steps} steps in {result.seconds:.0f} s{resumed}, final loss {result.final_loss:.4f}."

    def data_version(self, result: TrainedLora) -> str:
        """Return the digest of the weights."""
        return result.weights_sha256

    def metadata(self, result: TrainedLora) -> dict[str, Any]:
        """Return metrics, images, files and settings."""
        spec = self.spec
        masked = ", ".join(dataset.dataset_id for dataset in spec.datasets if dataset.masks)
        regularisation = ", ".join(
            dataset.dataset_id for dataset in spec.datasets if dataset.is_regularisation
        )
        objective = [(key, str(value)) for key, value in spec.settings.changed_objective.items()]
        grid = result.validation_sheet_path
        return drop_none(
            {
                "summary": self.summary(result),
                "final_loss": result.final_loss,
                "eval_loss": result.eval_losses[-1][1] if result.eval_losses else None,
                "eval_losses": markdown_table(("step", "eval loss"), result.eval_losses)
                if result.eval_losses
                else None,
                "steps": result.steps,
                "skipped_steps": result.skipped_steps or None,
                "continued_from": f"step {result.ancestor.step} of the run {result.ancestor.identity[:16]}"
                if result.ancestor
                else None,
                "epochs": result.epochs,
                "images_seen": result.samples,
                "datasets": _trained_datasets(result),
                "masked_datasets": masked or None,
                "regularisation_datasets": regularisation or None,
                "objective": markdown_table(("setting", "value"), objective) if objective else None,
                "steps_per_second": result.steps_per_second,
                "seconds": result.seconds,
                "peak_memory_bytes": result.peak_memory_bytes,
                "memory": _memory(result),
                "trainable_parameters": result.trainable_parameters,
                "adapted_modules": result.adapted_modules,
                "loss_curve": inline_image(
                    result.loss_curve_path, "loss, gradient norm and learning rate over steps"
                ),
                "validation": inline_image(grid, "validation images over steps") if grid else None,
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
                "setting_differences": _differences_table(self.differences.values(), self.overrides),
                OVERRIDES_ENTRY: ", ".join(each.setting for each in result.overrides) or None,
            }
            | _adapter(spec.settings)
            | {METADATA_ENTRY: self._project_fingerprint()}
        )

    def check_results(self, result: TrainedLora) -> list[dg.AssetCheckResult]:
        """Return the results of `LORA_CHECKS`."""
        return result_checks.check_lora(result, self.model, self.settings)

    def tags(self, result: TrainedLora) -> Mapping[str, str] | None:
        """Return the code version of an overridden training.

        Dagster records that of the definition, which does not include overrides; this tag replaces it, so that the UI marks weights
        that config.json does not describe as stale.
        """
        if not self.overrides:
            return None
        return {"dagster/code_version": version(CODE, [result.identity, result.released_weights])}

    def _project_fingerprint(self) -> str:
        overrides = {each.setting: each.used for each in self.overrides}
        return project_fingerprint(self.project, self.training_set.fingerprints, overrides)


def build_lora(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/lora`; its data version is the digest of the weights, so downstream assets are stale exactly when they change."""
    key = project_key(project, "lora")
    settings_read = project.training.model_dump(mode="json", include=keys_used_by(TrainingSettings, "lora"))

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "torch", "safetensors", device=True),
        ins=model_input(project) | training_set_input(project),
        code_version=version(CODE, [settings_affecting_weights(project.training), settings_read]),
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
            configured = trackers.apply(project.training)
            settings, _ = resolve_settings(configured, profile, config.settings, project.folder)
            settings = resolve_init_lora(settings, project.folder)
        if settings.push_to_hub and settings.hub_model_id:
            # Fail before training if the token cannot push.
            hub.check_can_push(settings.hub_model_id)
        work_dir = storage.work_dir(project.name, "lora")
        training = LoraTraining(project, work_dir, profile, settings, model, training_set)
        with user_errors_as_failures():
            training.write_spec()
        if training.overrides:
            changes = ", ".join(f"{each.setting} = {each.used}" for each in training.overrides)
            context.log.info(f"Settings of this run that change the configured weights: {changes}.")
        environment = trackers.environment() | webhook.environment(settings) | hub.environment()
        yield training.materialize(context, launcher, environment)

    return lora


def validation_prompts(project: Project) -> tuple[ValidationPrompt, ...]:
    """Return the project's prompts for a spec."""
    return tuple(
        ValidationPrompt(name=prompt.name, prompt=prompt.prompt, negative_prompt=prompt.negative_prompt)
        for prompt in project.prompts
    )


def read_training_spec(lora: TrainedLora) -> TrainSpec:
    """Return the spec that these weights were trained with."""
    return TrainSpec.model_validate_json((Path(lora.run_dir) / SPEC_FILE).read_text(encoding="utf-8"))


def _adapter(settings: TrainingSettings) -> dict[str, Any]:
    if settings.model_type != "lora":
        return {}
    return {
        "adapter": adapter_name(settings).partition(" ")[2],
        "init_lora_sha256": initial_adapter_digest(settings.init_lora),
    }


def _differences_table(
    differences: Iterable[SettingDifference], overrides: Sequence[SettingDifference]
) -> dg.MetadataValue | None:
    """Return the settings that differ from config.json, and whether each changes the weights (is one of `overrides`)."""
    rows = [
        (f"`{each.setting}`", each.configured, each.used, "yes" if each in overrides else "no")
        for each in differences
    ]
    header = ("setting", "configured", "this run", "changes the weights")
    return markdown_table(header, rows) if rows else None


def _memory(result: TrainedLora) -> dg.MetadataValue | None:
    """Return the estimate made before the first step beside the measured peak, in GiB."""
    if result.estimated_memory_bytes is None:
        return None
    rows = [(name, size / 2**30) for name, size in result.memory_estimate.items()]
    peaks = [
        ("**estimated peak**", result.estimated_memory_bytes / 2**30),
        ("**measured peak**", result.peak_memory_bytes / 2**30),
    ]
    return markdown_table(("memory of the main process", "GiB"), [*rows, *peaks])


def _trained_datasets(result: TrainedLora) -> dg.MetadataValue | None:
    if not result.images_per_epoch:
        return None
    header = (
        "dataset",
        "trained images",
        "held-out images",
        "images per epoch",
        "appearances per epoch",
        "crops per image",
        "repeats raised to",
    )
    rows = [
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
    ]
    return markdown_table(header, rows)
