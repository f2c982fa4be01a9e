"""Jobs: a project trains again, by its schedule or when its files have changed, and only when a run is due; what is left over is freed."""

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
    # Dagster gives no public name to what define_asset_job returns.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

SENSOR_INTERVAL_SECONDS = 60
CLAIM_SECONDS = 60
"""How long a run may take from the decision for it until it is in the instance."""

_UNFINISHED = [
    status
    for status in dg.DagsterRunStatus
    if status not in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
]
_DECIDING = threading.Lock()
_FREED_COLUMNS = dg.TableSchema(
    [
        dg.TableColumn("what"),
        dg.TableColumn("where"),
        dg.TableColumn("count", "int"),
        dg.TableColumn("bytes", "int"),
    ]
)


def job_name(project: Project) -> str:
    """Name of `retraining_job`."""
    return f"{project.name}_train"


def retraining_job(project: Project) -> "UnresolvedAssetJobDefinition":
    """The project's whole graph as a job."""
    return dg.define_asset_job(
        job_name(project),
        selection=dg.AssetSelection.groups(project.name),
        description=f"Every asset of {project.name}; stages whose inputs did not change reuse what they have.",
    )


def lora_key(project: Project) -> dg.AssetKey:
    """Return the key of the asset that a retraining is for."""
    return dg.AssetKey([project.name, "lora"])


def trained_fingerprint(instance: dg.DagsterInstance, project: Project) -> str | None:
    """Return the state of files and settings at the last finished training; None when there was none."""
    fingerprint = _recorded(instance, lora_key(project)).get(METADATA_ENTRY)
    return None if fingerprint is None else str(fingerprint.value)


def reason_to_wait(
    instance: dg.DagsterInstance, project: Project, state: str, *, sources_unknown: bool = False
) -> str | None:
    """Return why no run is to be started for this state of files and settings now; None when one is due.

    At most one unfinished run at a time trains a project's LoRA, whoever started it, and a state whose run failed is not tried again
    before something changes. With `sources_unknown` only the run can find out whether anything has changed: it waits for nothing but an
    unfinished one.
    """
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
        run = record.dagster_run
        planned = instance.get_asset_keys_for_run(
            run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
        )
        if lora_key(project) in planned:
            return (
                f"The run {run.run_id[:8]} trains this LoRA and is not finished ({run.status.value.lower()}). "
                "If no process of it is left, terminate it in the UI."
            )
    if sources_unknown:
        return None
    if state == trained_fingerprint(instance, project):
        return "Images, captions and settings are unchanged since the last training."
    trained = instance.get_latest_materialization_event(lora_key(project))
    for record in instance.get_run_records(dg.RunsFilter(tags={METADATA_ENTRY: state}), limit=1):
        run = record.dagster_run
        gave_this_lora = trained is not None and trained.run_id == run.run_id
        failed_since = run.status is not dg.DagsterRunStatus.SUCCESS and (
            trained is None or record.create_timestamp.timestamp() > trained.timestamp
        )
        overridden = OVERRIDES_ENTRY in _recorded(instance, lora_key(project))
        if failed_since or (gave_this_lora and not overridden):
            return (
                f"The run {run.run_id[:8]} for this state of files and settings ended ({run.status.value.lower()}), and nothing has "
                "changed since. Change a file or a setting, or materialize by hand."
            )
    return None


def retraining_cause(instance: dg.DagsterInstance, project: Project, sources_unknown: bool = False) -> str:
    """Return in words what makes a training due."""
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
        if (entry := _recorded(instance, dg.AssetKey(key.split("/"))).get(METADATA_ENTRY)) is not None
    }
    if changed := [key for key, before in recorded.items() if before != found[key]]:
        causes.append(f"files changed in {', '.join(changed)}")
    if OVERRIDES_ENTRY not in trained and project_fingerprint(project, recorded) != str(
        trained[METADATA_ENTRY].value
    ):
        causes.append("settings changed in config.json or multidatabackend.json")
    if sources_unknown:
        causes.append("images are stored elsewhere: the run finds out whether they changed")
    return "; ".join(causes) or "images, captions or settings differ from those of the last training"


def request_retraining(
    instance: dg.DagsterInstance,
    project: Project,
    state: str,
    asker: str,
    *,
    sources_unknown: bool = False,
) -> dg.RunRequest | dg.SkipReason:
    """Return the run that is due for this state of files and settings, or why there is none.

    Schedule and sensor are evaluated at the same time, and a run that one of them asks for exists only seconds later: the `asker` that
    is first holds a claim meanwhile.
    """
    with _DECIDING:
        if (reason := reason_to_wait(instance, project, state, sources_unknown=sources_unknown)) is not None:
            return dg.SkipReason(reason)
        claim, now = f"sdxl_pipeline/retraining/{project.name}", time.time()
        held = instance.daemon_cursor_storage.get_cursor_values({claim}).get(claim)
        holder, since = json.loads(held) if held else (asker, now)
        if holder != asker and now - since < CLAIM_SECONDS:
            return dg.SkipReason(f"The {holder} has just asked for a run of this project.")
        instance.daemon_cursor_storage.set_cursor_values({claim: json.dumps([asker, now])})
    cause = retraining_cause(instance, project, sources_unknown)
    return dg.RunRequest(tags={METADATA_ENTRY: state, "reason": f"{asker}: {cause}"})


def build_schedule(project: Project) -> dg.ScheduleDefinition | None:
    """Return the re-training at the times of `retraining_cron`; None when the project has no such setting."""
    cron = project.training.retraining_cron
    if cron is None:
        return None

    @dg.schedule(
        name=f"{project.name}_retraining",
        job_name=job_name(project),
        cron_schedule=cron,
        # The cron line in config.json is the user's switch; a second one in the UI would be easy to miss.
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Trains again at the times of retraining_cron if images, captions or settings have changed since the last training. "
        "Where images are stored elsewhere, the run finds out whether they have.",
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
    """Return the sensor that asks for a run once the project's files have changed and stay as they are; off until switched on in the UI."""

    @dg.sensor(
        name=f"{project.name}_files",
        job_name=job_name(project),
        minimum_interval_seconds=SENSOR_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Trains again when images, captions or settings have changed.",
    )
    def files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            current = load_project(project.folder)
        except ProjectError as error:
            return dg.SkipReason(str(error))
        if trained_fingerprint(context.instance, current) is None:
            return dg.SkipReason("Not trained yet: materialize the project once by hand.")
        now = project_fingerprint(current)
        if (reason := reason_to_wait(context.instance, current, now)) is not None:
            return dg.SkipReason(reason)
        if now != context.cursor:
            # A copy may be under way: wait until two evaluations see the same files.
            return dg.SensorResult(skip_reason="Files are changing: checking again.", cursor=now)
        answer = request_retraining(context.instance, current, now, "sensor")
        if isinstance(answer, dg.SkipReason):
            return answer
        return dg.SensorResult(run_requests=[answer], cursor=now)

    return files


def _recorded(instance: dg.DagsterInstance, key: dg.AssetKey) -> Mapping[str, dg.MetadataValue]:
    """Return the metadata of an asset's latest materialization."""
    event = instance.get_latest_materialization_event(key)
    materialization = event.asset_materialization if event else None
    return materialization.metadata if materialization else {}


class PruneConfig(dg.Config):
    """How a prune is to go about it."""

    dry_run: bool = Field(default=False, description="Only tell what would be freed.")


def build_prune_job(root: Path | None = None) -> dg.JobDefinition:
    """The job `prune`: frees what no project refers to, in all stores and folders of the storage, and keeps a history of how much.

    `root` is the folder of the projects (default: as `discover_projects` has it).
    """

    @dg.op(
        name="garbage_collect",
        out=dg.Out(dg.Nothing),
        description="Entries, tables, downloads and leftovers that no project refers to and no running stage uses.",
    )
    def free(context: dg.OpExecutionContext, config: PruneConfig, storage: Storage) -> None:
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
                description="What no project refers to.",
                metadata={
                    "bytes_to_free" if config.dry_run else "bytes_freed": report.bytes,
                    "entries": sum(item.count for item in report.freed if item.what == "entries"),
                    "freed": dg.MetadataValue.table(records, _FREED_COLUMNS),
                    "kept": dg.MetadataValue.md(
                        "\n".join(f"- {note}" for note in report.notes) or "nothing unexpected"
                    ),
                },
            )
        )

    @dg.job(name="prune", description="Frees what no project refers to. Running stages are not disturbed.")
    def prune_job() -> None:
        free()

    return prune_job
