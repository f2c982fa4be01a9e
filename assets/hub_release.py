"""The release: a folder with the LoRA, its model card and its lineage, pushed to the Hub if push_to_hub is true."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from assets.asset_keys import asset_attributes, model_input, project_key, training_set_input, version
from assets.evaluation import release_dir
from assets.event_log import user_errors_as_failures
from assets.lora import read_training_spec
from assets.metadata import release_metadata
from resources.hub import HubResource
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import build_release, verify_export, verify_formats
from sdxl_pipeline.release.formats.kohya_header import trigger_words
from sdxl_pipeline.release.release_inputs import ReleaseInputs
from sdxl_pipeline.runtime.specs import EvaluationReport, HubRelease, TrainedLora, TrainingSet

CODE = "2"
MIN_PREFIX_LENGTH = 8
"""Shortest prefix of an identity that `promote` accepts."""


class ReleaseConfig(dg.Config):
    """The LoRA that one run releases."""

    promote: str = Field(
        default="",
        description=f"Identity (its first {MIN_PREFIX_LENGTH} characters or more) of the only LoRA to release, with or without overrides of "
        "config.json. Empty: release the current LoRA if it was trained without overrides.",
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
        _require_releasable(context.asset_key, lora, config.promote)
        trained = read_training_spec(lora)
        lineage = _lineage(project, model, training_set, lora)
        with user_errors_as_failures():
            if lora.weights_kind == "lora":  # verify_formats reads the whole folder of a UNet
                verify_export(Path(lora.weights_path), model)
            # Repeated here: a run of this asset alone does not wait for the evaluation's checks.
            context.log.info(verify_formats(lora, model, trained.settings))
            folder = build_release(
                release_dir(project),
                ReleaseInputs(
                    project=project.name,
                    base_model=model,
                    settings=trained.settings,
                    lora=lora,
                    report=evaluation,
                    prompts=trained.prompts,
                    trigger_words=trigger_words(trained),
                    lineage=lineage,
                ),
            )
        release = _publish(context, project, hub, folder, lineage)
        yield dg.MaterializeResult(
            value=release,
            data_version=dg.DataVersion(digest_json([lora.weights_sha256, release.commit])),
            metadata=release_metadata(release, evaluation.gallery_path),
        )

    return hub_release


def _require_releasable(key: dg.AssetKey, lora: TrainedLora, promote: str) -> None:
    """Raise `dagster.Failure` unless `promote` is the LoRA's identity, or is empty and the LoRA was trained as configured."""
    promoted = len(promote) >= MIN_PREFIX_LENGTH and lora.identity.startswith(promote)
    if promoted or not (promote or lora.overrides):
        return
    op, prefix = key.to_python_identifier(), lora.identity[:16]
    if promote:
        problem = f"promote {promote!r} is not the identity of the current LoRA, which is {prefix}"
        if len(promote) < MIN_PREFIX_LENGTH:
            problem += f" (write at least {MIN_PREFIX_LENGTH} characters of it)"
    else:
        changes = "; ".join(
            f"{each.setting}: {each.used} instead of {each.configured}" for each in lora.overrides
        )
        problem = f"the LoRA {prefix} was trained with settings that differ from config.json ({changes})"
    run_config = json.dumps({"ops": {op: {"config": {"promote": prefix}}}})
    raise dg.Failure(
        f"Not released: {problem}. To release this LoRA, set promote to its identity. In the launchpad:\n"
        f"ops: {{{op}: {{config: {{promote: '{prefix}'}}}}}}\n"
        f"On the command line:\ndagster asset materialize -m sdxl_pipeline.definitions --select 'key:\"{key.to_user_string()}\"' "
        f"--config-json '{run_config}'\n"
        "To release the configured LoRA, materialize lora without overrides, then evaluation and hub_release.",
        allow_retries=False,
    )


def plain_overrides(lora: TrainedLora) -> dict[str, dict[str, Any]]:
    """Return the overridden settings as plain JSON values, in which local paths can be detected and removed."""
    return {
        each.setting: {"configured": json.loads(each.configured), "used": json.loads(each.used)}
        for each in lora.overrides
    }


def _publish(
    context: dg.AssetExecutionContext,
    project: Project,
    hub: HubResource,
    folder: Path,
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
        lineage=lineage,
    )
    repo_id = settings.hub_model_id
    if not settings.push_to_hub or repo_id is None:
        context.log.info(f"push_to_hub is off: the release is in {folder}.")
        return release
    commit, url = hub.upload_folder(
        folder,
        repo_id,
        private=settings.model_card_private,
        commit_message=f"{project.name}: {lineage['weights_sha256'][:12]}",
    )
    context.log.info(f"Pushed to {url} at {commit}.")
    return release.model_copy(update={"pushed": True, "repo_id": repo_id, "commit": commit, "url": url})


def _lineage(
    project: Project, model: ResolvedModel, training_set: TrainingSet, lora: TrainedLora
) -> dict[str, Any]:
    """Return the data version of each upstream asset, the base model's revision and digests, and the weights' digest."""
    return {
        "data_versions": {
            f"{project.name}/base_model": model.digest,
            f"{project.name}/lora": lora.weights_sha256,
            **training_set.data_versions,
        },
        "base_model": model.source,
        "base_model_revision": model.revision,
        "base_model_digests": dict(model.digests),
        "training_identity": lora.identity,
        "weights_sha256": lora.weights_sha256,
        **({"overrides": plain_overrides(lora)} if lora.overrides else {}),
    }
