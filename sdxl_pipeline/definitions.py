"""The code location: every project's assets, jobs, schedules and sensors, and the shared resources."""

from pathlib import Path

import dagster as dg

import assets
import resources
from resources.hardware import HardwareProfile
from resources.hub import HubResource
from resources.run_liveness import follow_run_process, live_run_executor
from resources.stage_client import LocalStageClient
from resources.storage import Storage, ValueIOManager
from resources.trackers import TrackerResource
from resources.webhook import WebhookResource
from sdxl_pipeline.automation import build_prune_job, build_schedule, build_sensor, retraining_job
from sdxl_pipeline.config.loader import InvalidProject, Project, discover_projects
from sdxl_pipeline.config.problems import ProjectError, as_project_errors

REPOSITORY = Path(__file__).resolve().parent.parent
PRELOADED = ["dagster._cli", "sdxl_pipeline.definitions", "pyarrow.parquet", "matplotlib.figure"]
"""Modules that every step needs, imported once per run and inherited by its step processes; never torch, whose threads do not survive a fork."""

EXECUTOR = live_run_executor.configured({"start_method": {"forkserver": {"preload_modules": PRELOADED}}})


def check_packages() -> None:
    """Raise ImportError when `assets` or `resources` belong to another package, which these common names make likely."""
    for package in (assets, resources):
        found = Path(str(package.__file__)).resolve().parent.parent
        if found != REPOSITORY:
            raise ImportError(
                f"The package {package.__name__!r} was imported from {found}, not from {REPOSITORY}. "
                "Start Dagster in the repository's folder, or remove the other package from PYTHONPATH."
            )


def build_definitions(root: Path | None = None) -> dg.Definitions:
    """Return the definitions of all projects below `root` (default: SDXL_PIPELINE_PROJECTS, else the repository's projects/)."""
    storage = Storage()
    shared = dg.Definitions(
        jobs=[build_prune_job(root)],
        executor=EXECUTOR,
        resources={
            "hardware": HardwareProfile.configure_at_launch(),
            "launcher": LocalStageClient(),
            "storage": storage,
            "io_manager": ValueIOManager(storage=storage),
            "hub": HubResource(),
            "trackers": TrackerResource(),
            "webhook": WebhookResource(),
        },
    )
    return dg.Definitions.merge(
        *(_project_definitions(project) for project in discover_projects(root)), shared
    )


def _project_definitions(project: Project | InvalidProject) -> dg.Definitions:
    """Return the definitions of one project. If Dagster itself rejects its settings, it becomes an invalid project; others are not affected."""
    if isinstance(project, InvalidProject):
        return dg.Definitions(assets=[assets.build_invalid_project(project)])
    try:
        with as_project_errors(project.folder):
            schedule = build_schedule(project)
            return dg.Definitions(
                assets=assets.build_assets(project),
                jobs=[retraining_job(project)],
                schedules=[] if schedule is None else [schedule],
                sensors=[build_sensor(project)],
            )
    except ProjectError as error:
        return _project_definitions(InvalidProject(project.name, project.folder, error))


@dg.definitions
def defs() -> dg.Definitions:
    """Return the definitions that Dagster loads."""
    check_packages()
    follow_run_process()
    return build_definitions()
