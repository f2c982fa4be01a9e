"""When a project trains again by itself: on its schedule, or when its pictures have changed. Neither runs for nothing."""

from typing import TYPE_CHECKING

import dagster as dg

from sdxl_pipeline.images.fingerprint import METADATA_ENTRY, project_fingerprint
from sdxl_pipeline.project.project import Project

if TYPE_CHECKING:
    # Dagster gives no public name to what define_asset_job returns.
    from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

SENSOR_INTERVAL_SECONDS = 60


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
        description="Trains again at the times of retraining_cron, if pictures or settings have changed since.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = project_fingerprint(project)
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
