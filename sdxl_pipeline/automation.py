"""Jobs: a project trains again, by its schedule or when its pictures have changed, neither for nothing; what is left over is freed."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.storage import Storage
from sdxl_pipeline.images.fingerprint import METADATA_ENTRY, lies_elsewhere, project_fingerprint
from sdxl_pipeline.project.project import Project, projects_folder

if TYPE_CHECKING:
    # Dagster gives no public name to what define_asset_job returns.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

SENSOR_INTERVAL_SECONDS = 60
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


def trained_fingerprint(instance: dg.DagsterInstance, project: Project) -> str | None:
    """State of files and settings at the last finished training; None when there was none."""
    event = instance.get_latest_materialization_event(dg.AssetKey([project.name, "lora"]))
    materialization = event.asset_materialization if event else None
    if materialization is None or METADATA_ENTRY not in materialization.metadata:
        return None
    return str(materialization.metadata[METADATA_ENTRY].value)


def build_schedule(project: Project) -> dg.ScheduleDefinition | None:
    """Re-training at the times of `retraining_cron`; None when the project has no such setting."""
    cron = project.training.retraining_cron
    if cron is None:
        return None

    @dg.schedule(
        name=f"{project.name}_retraining",
        job_name=job_name(project),
        cron_schedule=cron,
        # The cron line in config.json is the user's switch; a second one in the UI would be easy to miss.
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Trains again at the times of retraining_cron, if pictures or settings have changed since; looks whether they have where "
        "pictures lie elsewhere.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = project_fingerprint(project)
        if lies_elsewhere(project):
            # Only the run can see whether anything is new; if nothing is, it reuses what there is.
            return dg.RunRequest(
                run_key=f"{project.name}-{context.scheduled_execution_time.isoformat()}",
                tags={METADATA_ENTRY: now},
            )
        if now == trained_fingerprint(context.instance, project):
            return dg.SkipReason("Pictures, captions and settings are as they were at the last training.")
        return dg.RunRequest(run_key=f"{project.name}-{now}", tags={METADATA_ENTRY: now})

    return retraining


def build_sensor(project: Project) -> dg.SensorDefinition:
    """Asks for a run once the project's files have changed and lie still; off until it is switched on in the UI."""

    @dg.sensor(
        name=f"{project.name}_files",
        job_name=job_name(project),
        minimum_interval_seconds=SENSOR_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Trains again when pictures, captions or settings have changed.",
    )
    def files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        trained = trained_fingerprint(context.instance, project)
        if trained is None:
            return dg.SkipReason("Not trained yet: materialize the project once by hand.")
        now = project_fingerprint(project)
        if now == trained:
            return dg.SkipReason("Nothing has changed since the last training.")
        if now != context.cursor:
            # A copy may be under way: wait until two looks see the same files.
            return dg.SensorResult(skip_reason="Files are changing: looking again.", cursor=now)
        # The run key makes each state of the files ask once, so a failing training is not repeated every minute.
        return dg.SensorResult(
            run_requests=[dg.RunRequest(run_key=f"{project.name}-{now}", tags={METADATA_ENTRY: now})],
            cursor=now,
        )

    return files


class PruneConfig(dg.Config):
    """How a prune is to go about it."""

    dry_run: bool = Field(default=False, description="Only tell what would be freed.")


def build_prune_job(root: Path | None = None) -> dg.JobDefinition:
    """The job `prune`: frees what no project refers to, in all stores and folders of the storage, and keeps a history of how much.

    `root` is the folder of the projects (default: as `discover_projects` has it).
    """

    @dg.op(
        name="free_what_no_project_refers_to",
        out=dg.Out(dg.Nothing),
        description="Entries, tables, downloads and leftovers that no project refers to and no running stage uses.",
    )
    def free(context: dg.OpExecutionContext, config: PruneConfig, storage: Storage) -> None:
        from sdxl_pipeline.pruning.prune import prune
        from sdxl_pipeline.pruning.references import PruneError

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
