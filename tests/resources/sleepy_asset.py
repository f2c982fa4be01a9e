"""Assets that launch the sleepy stage, configured by environment variables.

`python -m tests.resources.sleepy_asset` materializes it in this process; the code location is for the dagster command.
"""

import os
import sys
from pathlib import Path

import dagster as dg

from resources.run_liveness import follow_run_process
from resources.stage_client import LocalStageClient
from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware
from sdxl_pipeline.definitions import EXECUTOR
from tests.stages.sleepy_stage import SleepyManifest, SleepySpec, note


def launch(context: dg.AssetExecutionContext, launcher: LocalStageClient) -> dg.MaterializeResult:
    spec = SleepySpec.model_validate_json(os.environ["SLEEPY_SPEC"])
    note(spec.folder / "worker.pid", os.getpid())
    hardware = Hardware.model_validate(
        PRESETS["cpu"].model_dump() | {"num_processes": int(os.environ.get("SLEEPY_PROCESSES", "1"))}
    )
    manifest = launcher.run_stage(
        context,
        os.environ.get("SLEEPY_STAGE", "tests.stages.sleepy_stage"),
        spec,
        SleepyManifest,
        Path(os.environ["SLEEPY_WORK_DIR"]),
        hardware,
        {"EXTRA": "yes"},
    )
    return dg.MaterializeResult(metadata={"steps": manifest.steps})


@dg.asset
def sleepy(context: dg.AssetExecutionContext, launcher: LocalStageClient) -> dg.MaterializeResult:
    return launch(context, launcher)


@dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
def sleepy_with_a_retry(
    context: dg.AssetExecutionContext, launcher: LocalStageClient
) -> dg.MaterializeResult:
    return launch(context, launcher)


@dg.asset(pool="gpu")
def pooled(context: dg.AssetExecutionContext, launcher: LocalStageClient) -> dg.MaterializeResult:
    return launch(context, launcher)


def launcher() -> LocalStageClient:
    return LocalStageClient(
        stop_timeout_seconds=float(os.environ.get("SLEEPY_STOP_TIMEOUT", "30")), metric_points=10
    )


@dg.definitions
def defs() -> dg.Definitions:
    follow_run_process()
    return dg.Definitions(assets=[sleepy, pooled], resources={"launcher": launcher()}, executor=EXECUTOR)


if __name__ == "__main__":
    with dg.instance_for_test() as instance:
        outcome = dg.materialize(
            [sleepy], resources={"launcher": launcher()}, instance=instance, raise_on_error=False
        )
    sys.exit(0 if outcome.success else 1)
