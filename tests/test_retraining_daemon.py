"""With a real daemon, schedule and sensor request one run per state: while it is queued, across a restart, and after a failure."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from tests.conftest import draw_image
from tests.support.processes import wait_for
from tests.test_automation import record_training

QUEUE_ONLY = """
telemetry: {enabled: false}
concurrency: {runs: {max_concurrent_runs: 0}}
"""
LOCATION = """
from sdxl_pipeline import automation

automation.SENSOR_INTERVAL_SECONDS = 5
from sdxl_pipeline.definitions import build_definitions

defs = build_definitions()
"""


@contextmanager
def daemon(location: Path, log: Path) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", "-f", str(location)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ticks(instance: dg.DagsterInstance, *skip_reasons: str) -> dict[str, int]:
    """Return the number of evaluations by name of schedule or sensor; with reasons, only of those skipped for one of them."""
    return {
        state.instigator_name: sum(
            not skip_reasons or any(reason in (tick.skip_reason or "") for reason in skip_reasons)
            for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)
        )
        for state in instance.all_instigator_state()
    }


def wait_for_both(instance: dg.DagsterInstance, reason: str) -> None:
    """Wait until schedule and sensor have each been skipped once more for this reason."""
    before = ticks(instance, reason)
    wait_for(
        lambda: all(
            ticks(instance, reason).get(name, 0) > before.get(name, 0)
            for name in ("nightly_retraining", "nightly_files")
        ),
        150,
        f"both are skipped: {reason!r}",
    )


@pytest.mark.slow
def test_daemon_schedule_and_sensor_request_one_run_per_state(
    make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_project("nightly", config={"retraining_cron": "* * * * *"})
    home, location, log = tmp_path / "home", tmp_path / "location.py", tmp_path / "daemon.log"
    home.mkdir()
    (home / "dagster.yaml").write_text(QUEUE_ONLY)
    location.write_text(LOCATION)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("SDXL_PIPELINE_PROJECTS", str(folder.parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))

    with dg.DagsterInstance.from_config(str(home)) as instance:
        record_training(instance, folder)
        draw_image(folder / "data", 20)
        start = [
            *(sys.executable, "-m", "dagster", "sensor", "start", "nightly_files"),
            *("-f", str(location)),
        ]
        subprocess.run(start, check=True, timeout=120)

        with daemon(location, log):
            wait_for(lambda: instance.get_runs_count() > 0, 150, "a run is queued")
            wait_for_both(instance, "is not finished (queued)")
        with daemon(location, log):
            wait_for_both(instance, "is not finished (queued)")
            (run,) = instance.get_runs()
            assert run.status is dg.DagsterRunStatus.QUEUED
            instance.report_run_failed(run)
            wait_for_both(instance, "ended (failure), and nothing has changed since")
            assert instance.get_runs_count() == 1

            draw_image(folder / "data", 21)
            wait_for(lambda: instance.get_runs_count() > 1, 150, "the changed state has a run")
            wait_for_both(instance, "is not finished (queued)")
            assert instance.get_runs_count() == 2
