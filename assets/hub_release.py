"""The release: a folder with the evaluated checkpoint, its model card and its lineage, pushed to the Hub if push_to_hub is true."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.asset_keys import asset_attributes, model_input, project_key, training_set_input, version
from assets.checks import result_checks
from assets.evaluation import release_dir
from assets.event_log import user_errors_as_failures
from assets.metadata import release_metadata
from assets.run_lookup import data_versions, read_training_spec, require_base_model, select_run
from resources.hub import HubResource
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.history import mark_released
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import build_release, verify_export, verify_formats
from sdxl_pipeline.release.formats.kohya_header import trigger_words
from sdxl_pipeline.release.lineage import release_lineage
from sdxl_pipeline.release.release_inputs import ExportError, ReleaseInputs
from sdxl_pipeline.release.selected_weights import selected_lora
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport, HubRelease
from sdxl_pipeline.runtime.specs import TrainedLora, TrainingSet
from sdxl_pipeline.training.checkpoint.finished_runs import MIN_PREFIX_LENGTH

CODE = "4"
RELEASE_KEYS = keys_used_by(TrainingSettings, "hub_release") - keys_used_by(TrainingSettings, "lora")
"""Settings of the release alone; they may change after the training. Those of the exported files are the run's, as the files are."""


class ReleaseConfig(dg.Config):
    """The run that one run of this asset releases."""

    promote: str = Field(
        default="",
        description=f"Identity (its first {MIN_PREFIX_LENGTH} characters or more) of the only run to release: the evaluated one, current or "
        "not, with or without overrides of config.json. Empty: release the current LoRA if it was trained without overrides.",
    )


def build_hub_release(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/hub_release`."""
    settings = project.training

    @dg.asset(
        key=project_key(project, "hub_release"),
        **asset_attributes(project, "release", "huggingface"),
        ins=model_input(project)
        | training_set_input(project)
        | {
            "lora": dg.AssetIn(key=project_key(project, "lora"), dagster_type=TrainedLora),
            "evaluation": dg.AssetIn(key=project_key(project, "evaluation"), dagster_type=EvaluationReport),
        },
        code_version=version(
            CODE,
            settings.model_dump(mode="json", include=keys_used_by(TrainingSettings, "hub_release")),
        ),
        description="The published files, or the folder ready to publish: weights for diffusers, ComfyUI and A1111, model card, gallery, settings, lineage.",
    )
    def hub_release(
        context: dg.AssetExecutionContext,
        config: ReleaseConfig,
        hub: HubResource,
        model: ResolvedModel,
        training_set: TrainingSet,
        lora: TrainedLora,
        evaluation: EvaluationReport,
    ) -> Iterator[dg.MaterializeResult[HubRelease]]:
        with user_errors_as_failures():
            run = select_run(project, lora, evaluation.run_identity)
            _require_releasable(context.asset_key, run, lora, config.promote)
            _require_passed_checks(evaluation, settings)
            trained = read_training_spec(run)
            require_base_model(run, trained, model)
            released = selected_lora(run, evaluation.selected_weights, trained)
            if released.weights_kind == "lora":  # verify_formats reads the whole folder of a UNet
                verify_export(Path(released.weights_path), model)
            _verify_formats(context, released, model, settings, trained.settings)
            weights = evaluation.selected_weights
            lineage = release_lineage(
                project,
                model,
                training_set.data_versions if run is lora else data_versions(project, run, trained),
                released,
                trained,
                is_final=weights is None or weights.is_final,
            )
            folder = build_release(
                release_dir(project),
                ReleaseInputs(
                    project=project.name,
                    base_model=model,
                    settings=trained.settings.model_copy(update=_release_settings(settings, hub)),
                    lora=released,
                    report=evaluation,
                    prompts=trained.prompts,
                    trigger_words=trigger_words(trained),
                    lineage=lineage,
                ),
            )
        release = _publish(context, project, hub, folder, released, lineage)
        mark_released(Path(settings.output_dir), evaluation.identity, release.tag)
        yield dg.MaterializeResult(
            value=release,
            data_version=dg.DataVersion(digest_json([released.weights_sha256, release.commit])),
            metadata=release_metadata(release, evaluation.gallery_path, is_current=run is lora),
        )

    return hub_release


def _release_settings(settings: TrainingSettings, hub: HubResource) -> dict[str, Any]:
    """Return the values of RELEASE_KEYS, with the owner in hub_model_id if the release is pushed."""
    values = {key: getattr(settings, key) for key in RELEASE_KEYS}
    if settings.push_to_hub and settings.hub_model_id is not None:
        values["hub_model_id"] = hub.qualified_id(settings.hub_model_id)
    return values


def _require_releasable(key: dg.AssetKey, run: TrainedLora, current: TrainedLora, promote: str) -> None:
    """Raise `dagster.Failure` unless `promote` is the identity of the evaluated run, or is empty and the run is the LoRA of config.json."""
    is_current = run.identity == current.identity
    promoted = len(promote) >= MIN_PREFIX_LENGTH and run.identity.startswith(promote)
    if promoted or (is_current and not promote and not run.overrides):
        return
    op, prefix = key.to_python_identifier(), run.identity[:16]
    changes = "; ".join(f"{each.setting}: {each.used} instead of {each.configured}" for each in run.overrides)
    if promote:
        which = "current LoRA" if is_current else "evaluated run"
        problem = f"promote {promote!r} is not the identity of the {which}, which is {prefix}"
        if len(promote) < MIN_PREFIX_LENGTH:
            problem += f" (write at least {MIN_PREFIX_LENGTH} characters of it)"
    elif is_current:
        problem = f"the LoRA {prefix} was trained with settings that differ from config.json ({changes})"
    else:
        problem = f"the evaluated run {prefix} is not the current LoRA, which is {current.identity[:16]}" + (
            f"; settings that differ from config.json: {changes}" if changes else ""
        )
    run_config = json.dumps({"ops": {op: {"config": {"promote": prefix}}}})
    raise dg.Failure(
        f"Not released: {problem}. To release this {'LoRA' if is_current else 'run'}, set promote to its identity. In the launchpad:\n"
        f"ops: {{{op}: {{config: {{promote: '{prefix}'}}}}}}\n"
        f"On the command line:\ndagster asset materialize -m sdxl_pipeline.definitions --select 'key:\"{key.to_user_string()}\"' "
        f"--config-json '{run_config}'\n"
        "To release the configured LoRA, materialize lora without overrides, then evaluation and hub_release.\n"
        f"To release another finished run: sdxl-pipeline release {key.path[0]} --run IDENTITY (sdxl-pipeline runs {key.path[0]} lists them).",
        allow_retries=False,
    )


def _require_passed_checks(evaluation: EvaluationReport, settings: TrainingSettings) -> None:
    """Raise `dagster.Failure` if a blocking check of the evaluation fails: a run of this asset alone does not wait for them."""
    failed = result_checks.blocking_failures(result_checks.check_evaluation(evaluation, settings))
    if failed:
        reasons = "\n".join(f"{result.check_name}: {result.description}" for result in failed)
        setting = json.dumps({"evaluation_checks": {str(result.check_name): "warning" for result in failed}})
        raise dg.Failure(
            f"Not released: the evaluation {evaluation.identity[:16]} failed.\n{reasons}\n"
            "Release another checkpoint (released_checkpoint), or train again with more images or fewer steps. "
            f"To release these weights nevertheless, write {setting[1:-1]} in config.json.",
            allow_retries=False,
        )


def _verify_formats(
    context: dg.AssetExecutionContext,
    released: TrainedLora,
    model: ResolvedModel,
    settings: TrainingSettings,
    trained: TrainingSettings,
) -> None:
    """Verify the files with the readers' rules; a failure raises ExportError, or is logged if the check is configured as a warning."""
    try:
        context.log.info(verify_formats(released, model, trained))
    except ExportError as error:
        if result_checks.RELEASE_FORMATS_VALID.configured(settings.evaluation_checks).blocking:
            raise
        context.log.warning(f"release_formats_valid is a warning, so the release goes on: {error}")


def _publish(
    context: dg.AssetExecutionContext,
    project: Project,
    hub: HubResource,
    folder: Path,
    released: TrainedLora,
    lineage: dict[str, Any],
) -> HubRelease:
    settings = project.training
    release = HubRelease(
        folder=str(folder),
        files=tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())),
        model_card_path=str(folder / "README.md"),
        pushed=False,
        repo_id=None,
        commit=None,
        url=None,
        run_identity=released.identity,
        step=released.steps,
        lineage=lineage,
    )
    repo_id = settings.hub_model_id
    if not settings.push_to_hub or repo_id is None:
        context.log.info(f"push_to_hub is off: the release is in {folder}.")
        return release
    published = hub.publish(
        folder,
        repo_id,
        private=settings.model_card_private,
        commit_message=f"{project.name}: {released.weights_sha256[:12]}",
    )
    done = "Pushed" if published.changed else "The Hub already had these files"
    context.log.info(f"{done}: {published.url}, tag {published.tag}.")
    return release.model_copy(
        update={
            "pushed": True,
            "repo_id": published.repo_id,
            "commit": published.commit,
            "url": published.url,
            "tag": published.tag,
        }
    )
