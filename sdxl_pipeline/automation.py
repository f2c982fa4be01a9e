"""Jobs: retraining of a project by its schedule or when its files have changed, only when a run is due; and pruning of the storage."""

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.storage import Storage
from sdxl_pipeline.config.loader import Project, load_project, projects_folder
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.data.scan.dataset_fingerprint import (
    METADATA_ENTRY,
    OVERRIDES_ENTRY,
    folder_states,
    has_remote_datasets,
    project_fingerprint,
)

if TYPE_CHECKING:
    # The return type of define_asset_job is not public.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

SENSOR_INTERVAL_SECONDS = 60
CLAIM_SECONDS = 60
"""Longest time from the decision to start a run until the instance lists it."""

_UNFINISHED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
_DECISION_LOCK = threading.Lock()
_FREED_SCHEMA = dg.TableSchema(
    [
        dg.TableColumn("what"),
        dg.TableColumn("where"),
        dg.TableColumn("count", "int"),
        dg.TableColumn("bytes", "int"),
    ]
)


def job_name(project: Project) -> str:
    """Return the name of `retraining_job`."""
    return f"{project.name}_train"


def retraining_job(project: Project) -> "UnresolvedAssetJobDefinition":
    """Return the job that materializes all assets of the project."""
    return dg.define_asset_job(
        job_name(project),
        selection=dg.AssetSelection.groups(project.name),
        description=f"Every asset of {project.name}; stages with unchanged inputs reuse their results.",
    )


def lora_key(project: Project) -> dg.AssetKey:
    """Return the key of the project's LoRA."""
    return dg.AssetKey([project.name, "lora"])


def trained_fingerprint(instance: dg.DagsterInstance, project: Project) -> str | None:
    """Return the fingerprint of files and settings at the last finished training; None if there was none."""
    fingerprint = _recorded(instance, lora_key(project)).get(METADATA_ENTRY)
    return None if fingerprint is None else str(fingerprint.value)


def reason_to_wait(
    instance: dg.DagsterInstance, project: Project, state: str, *, sources_unknown: bool = False
) -> str | None:
    """Return why no run should start for this state of files and settings; None if one is due.

    At most one unfinished run trains a project's LoRA at a time, however it was started, and a state whose run failed is not retried
    before something changes. With `sources_unknown`, only a run can detect changes, so it waits for an unfinished run only.
    """
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
        run = record.dagster_run
        planned = instance.get_asset_keys_for_run(
            run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
        )
        if lora_key(project) in planned:
            return (
                f"The run {run.run_id[:8]} trains this LoRA and is not finished ({run.status.value.lower()}). "
                "If none of its processes is alive, terminate it in the UI."
            )
    if sources_unknown:
        return None
    if state == trained_fingerprint(instance, project):
        return "Images, captions and settings are unchanged since the last training."
    trained = instance.get_latest_materialization_event(lora_key(project))
    for record in instance.get_run_records(dg.RunsFilter(tags={METADATA_ENTRY: state}), limit=1):
        run = record.dagster_run
        produced_lora = trained is not None and trained.run_id == run.run_id
        failed_since = run.status is not dg.DagsterRunStatus.SUCCESS and (
            trained is None or record.create_timestamp.timestamp() > trained.timestamp
        )
        overridden = OVERRIDES_ENTRY in _recorded(instance, lora_key(project))
        if failed_since or (produced_lora and not overridden):
            return (
                f"The run {run.run_id[:8]} for this state of files and settings ended ({run.status.value.lower()}), and nothing has "
                "changed since. Change a file or a setting, or materialize by hand."
            )
    return None


def retraining_cause(instance: dg.DagsterInstance, project: Project, sources_unknown: bool = False) -> str:
    """Return a description of what makes a training due."""
    trained = _recorded(instance, lora_key(project))
    if METADATA_ENTRY not in trained:
        return "not trained yet"
    causes = []
    if OVERRIDES_ENTRY in trained:
        causes.append(f"the last training overrode settings: {trained[OVERRIDES_ENTRY].value}")
    found = folder_states(project)
    recorded = {
        key: str(entry.value)
        for key in found
        if (entry := _recorded(instance, dg.AssetKey.from_user_string(key)).get(METADATA_ENTRY)) is not None
    }
    if changed := [key for key, before in recorded.items() if before != found[key]]:
        causes.append(f"files changed in {', '.join(changed)}")
    if OVERRIDES_ENTRY not in trained and project_fingerprint(project, recorded) != str(
        trained[METADATA_ENTRY].value
    ):
        causes.append("settings changed in config.json or multidatabackend.json")
    if sources_unknown:
        causes.append("images are stored elsewhere: only the run detects whether they changed")
    return "; ".join(causes) or "images, captions or settings differ from those of the last training"


def request_retraining(
    instance: dg.DagsterInstance,
    project: Project,
    state: str,
    requester: str,
    *,
    sources_unknown: bool = False,
) -> dg.RunRequest | dg.SkipReason:
    """Return the run that is due for this state of files and settings, or the reason why none is.

    Schedule and sensor are evaluated concurrently, and a requested run exists only seconds later: until then the first `requester`
    holds a claim.
    """
    with _DECISION_LOCK:
        if (reason := reason_to_wait(instance, project, state, sources_unknown=sources_unknown)) is not None:
            return dg.SkipReason(reason)
        claim, now = f"sdxl_pipeline/retraining/{project.name}", time.time()
        held = instance.daemon_cursor_storage.get_cursor_values({claim}).get(claim)
        holder, since = json.loads(held) if held else (requester, now)
        if holder != requester and now - since < CLAIM_SECONDS:
            return dg.SkipReason(f"The {holder} has just requested a run of this project.")
        instance.daemon_cursor_storage.set_cursor_values({claim: json.dumps([requester, now])})
    cause = retraining_cause(instance, project, sources_unknown)
    return dg.RunRequest(tags={METADATA_ENTRY: state, "reason": f"{requester}: {cause}"})


def build_schedule(project: Project) -> dg.ScheduleDefinition | None:
    """Return the schedule that retrains at the times of `retraining_cron`; None without that setting."""
    cron = project.training.retraining_cron
    if cron is None:
        return None

    @dg.schedule(
        name=f"{project.name}_retraining",
        job_name=job_name(project),
        cron_schedule=cron,
        # The setting in config.json turns the schedule on; a second switch in the UI would be easy to miss.
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Retrains at the times of retraining_cron if images, captions or settings have changed since the last training. "
        "If images are stored elsewhere, the run itself detects changes.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            current = load_project(project.folder)
        except ProjectError as error:
            return dg.SkipReason(str(error))
        return request_retraining(
            context.instance,
            current,
            project_fingerprint(current),
            "schedule",
            sources_unknown=has_remote_datasets(current),
        )

    return retraining


def build_sensor(project: Project) -> dg.SensorDefinition:
    """Return the sensor that requests a run when the project's files have changed and are stable; off until started in the UI."""

    @dg.sensor(
        name=f"{project.name}_files",
        job_name=job_name(project),
        minimum_interval_seconds=SENSOR_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Retrains when images, captions or settings have changed.",
    )
    def files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            current = load_project(project.folder)
        except ProjectError as error:
            return dg.SkipReason(str(error))
        if trained_fingerprint(context.instance, current) is None:
            return dg.SkipReason("Not trained yet: materialize the project once by hand.")
        state = project_fingerprint(current)
        if (reason := reason_to_wait(context.instance, current, state)) is not None:
            return dg.SkipReason(reason)
        if state != context.cursor:
            # A copy may be in progress: wait until two evaluations see the same files.
            return dg.SensorResult(skip_reason="Files are changing: checking again.", cursor=state)
        answer = request_retraining(context.instance, current, state, "sensor")
        if isinstance(answer, dg.SkipReason):
            return answer
        return dg.SensorResult(run_requests=[answer], cursor=state)

    return files


def _recorded(instance: dg.DagsterInstance, key: dg.AssetKey) -> Mapping[str, dg.MetadataValue]:
    """Return the metadata of an asset's latest materialization."""
    event = instance.get_latest_materialization_event(key)
    materialization = event.asset_materialization if event else None
    return materialization.metadata if materialization else {}


class PruneConfig(dg.Config):
    """Options of a prune run."""

    dry_run: bool = Field(default=False, description="Only report what would be freed.")


def build_prune_job(root: Path | None = None) -> dg.JobDefinition:
    """Return the job `prune`, which frees what no project refers to in the storage and records how much.

    `root` is the folder of the projects (default: that of `discover_projects`).
    """

    @dg.op(
        name="garbage_collect",
        out=dg.Out(dg.Nothing),
        description="Deletes entries, tables, downloads and temporary files that no project refers to and no running stage uses.",
    )
    def garbage_collect(context: dg.OpExecutionContext, config: PruneConfig, storage: Storage) -> None:
        from sdxl_pipeline.cache.prune import prune
        from sdxl_pipeline.cache.references import PruneError

        try:
            report = prune(storage.path, projects_folder(root), dry_run=config.dry_run)
        except PruneError as error:
            raise dg.Failure(description=f"Nothing is freed: {error}", allow_retries=False) from error
        for note in report.notes:
            context.log.warning(f"Kept: {note}")
        context.log.info(
            f"{'Would free' if config.dry_run else 'Freed'} {report.bytes / 1e6:,.1f} MB under {storage.path}."
        )
        records = [
            dg.TableRecord(
                {"what": item.what, "where": str(item.where), "count": item.count, "bytes": item.bytes}
            )
            for item in report.freed
        ]
        event = dg.AssetObservation if config.dry_run else dg.AssetMaterialization
        context.log_event(
            event(
                asset_key="prune",
                description="Files and entries that no project refers to.",
                metadata={
                    "bytes_to_free" if config.dry_run else "bytes_freed": report.bytes,
                    "entries": sum(item.count for item in report.freed if item.what == "entries"),
                    "freed": dg.MetadataValue.table(records, _FREED_SCHEMA),
                    "kept": dg.MetadataValue.md(
                        "\n".join(f"- {note}" for note in report.notes) or "nothing unexpected"
                    ),
                },
            )
        )

    @dg.job(name="prune", description="Frees what no project refers to. Running stages are not affected.")
    def prune_job() -> None:
        garbage_collect()

    return prune_job
