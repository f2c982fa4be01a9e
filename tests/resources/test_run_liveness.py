"""Killed runs of real processes: their processes end, their pool slots are freed, and a waiting run logs the holder."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from resources.run_liveness import LiveRunLauncher, PoolWaitLog, fail_dead_runs, liveness_folder
from sdxl_pipeline.runtime.process_liveness import inspect_runs
from tests.resources.worker import REPOSITORY, Worker, wait_until_gone
from tests.stages.sleepy_stage import SleepySpec
from tests.support.processes import wait_for, wait_for_number

FOREVER = 100_000
MATERIALIZE = [
    str(Path(sys.executable).with_name("dagster")),
    *["asset", "materialize", "-m", "tests.resources.sleepy_asset", "--select", "pooled"],
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a Dagster home with the repository's dagster.yaml."""
    folder = tmp_path / "home"
    folder.mkdir()
    configuration = (REPOSITORY / "dagster.yaml").read_text()
    (folder / "dagster.yaml").write_text(configuration.replace(".dagster", str(folder / "dagster")))
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    return folder


def start(folder: Path, work_dir: Path, steps: int, **options: object) -> Worker:
    folder.mkdir()
    spec = SleepySpec.model_validate({"folder": folder, "steps": steps, **options})
    return Worker(spec, work_dir, MATERIALIZE)


def info_lines(worker: Worker, part: str) -> list[str]:
    return [line for line in worker.output.splitlines() if " - INFO - " in line and part in line]


def run_of_worker(worker: Worker, instance: dg.DagsterInstance) -> dg.DagsterRun:
    """Return the run that a worker's process executes."""
    with inspect_runs(liveness_folder(instance)) as runs:
        (run_id,) = [
            run.run_id
            for run in runs
            if any(f"process {worker.process.pid} " in process for process in run.alive)
        ]
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run


def test_killed_run_process_stage_saves_and_the_next_run_gets_the_slot(
    tmp_path: Path, work_dir: Path, home: Path
) -> None:
    killed = start(tmp_path / "killed", work_dir, FOREVER, helper=True, save_seconds=0.5)
    pids = killed.started("worker", "stage-0", "helper-0")
    with dg.DagsterInstance.get() as instance:
        run = run_of_worker(killed, instance)
        killed.process.kill()
        killed.end()
        wait_until_gone(pids, 30)
        assert (killed.folder / "saved").exists()
        stored = instance.get_run_by_id(run.run_id)
        assert stored is not None
        assert stored.status == dg.DagsterRunStatus.STARTED, "no run has checked yet"
        following = start(tmp_path / "following", work_dir, 5)
        assert following.end(240) == 0, following.output
        assert info_lines(following, f"Run {run.run_id} is marked as failed")
        stored = instance.get_run_by_id(run.run_id)
        assert stored is not None
        assert stored.status == dg.DagsterRunStatus.FAILURE
        assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots


@pytest.mark.slow
def test_waiting_run_logs_the_holder_and_continues_when_it_is_killed(
    tmp_path: Path, work_dir: Path, home: Path
) -> None:
    holder = start(tmp_path / "holder", work_dir, FOREVER)
    pids = holder.started("worker", "stage-0")
    with dg.DagsterInstance.get() as instance:
        run = run_of_worker(holder, instance)
        waiting = start(tmp_path / "waiting", work_dir, 5)
        wait_for(lambda: bool(info_lines(waiting, "Waiting for a slot")), 180, "a line about the wait")
        (line,) = info_lines(waiting, "Waiting for a slot in pool gpu")
        assert f"held by pooled of run {run.run_id} since 20" in line
        assert f"process {holder.process.pid} on " in line
        assert fail_dead_runs(instance) == [], "a live run is not changed"
        for pid in (holder.process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        holder.end()
        assert waiting.end(240) == 0, waiting.output
        stored = instance.get_run_by_id(run.run_id)
        assert stored is not None
        assert stored.status == dg.DagsterRunStatus.FAILURE


def start_run_process(instance: dg.DagsterInstance, run_id: str, folder: Path, *keys: str) -> Worker:
    """Start a process that counts as one of a run until it is killed."""
    code = (
        "import os, sys, time; from pathlib import Path; from sdxl_pipeline.runtime.process_liveness import hold_liveness; "
        "from tests.stages.sleepy_stage import note; hold_liveness(Path(sys.argv[1])); "
        "note(Path(sys.argv[2]), os.getpid()); time.sleep(600)"
    )
    pid = folder / "holder.pid"
    command = [sys.executable, "-c", code, str(liveness_folder(instance) / run_id), str(pid)]
    worker = Worker(SleepySpec(folder=folder), folder, command)
    wait_for_number(pid)
    return worker


def test_check_run_worker_health_dead_run_fails_and_frees_its_slot(tmp_path: Path, home: Path) -> None:
    with dg.DagsterInstance.get() as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, LiveRunLauncher)
        run = instance.create_run_for_job(
            dg.job(name="empty")(lambda: None), status=dg.DagsterRunStatus.STARTED
        )
        unknown = launcher.check_run_worker_health(run)
        assert unknown.status.value == "RUNNING", "without recorded processes nothing is done"
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        assert storage.claim_concurrency_slot("gpu", run.run_id, "step").is_claimed
        worker = start_run_process(instance, run.run_id, tmp_path)
        assert launcher.check_run_worker_health(run).status.value == "RUNNING"
        worker.process.kill()
        worker.end()
        health = launcher.check_run_worker_health(run)
        assert health.status.value == "FAILED"
        assert "ended without reporting it" in str(health.msg)
        assert not storage.get_concurrency_info("gpu").claimed_slots


def test_pool_wait_log_holder_on_another_machine_keeps_the_slot_until_force_terminated(home: Path) -> None:
    lines: list[str] = []
    log = SimpleNamespace(info=lines.append, warning=lines.append)
    with dg.DagsterInstance.get() as instance:
        empty = dg.job(name="empty")(lambda: None)
        holder, waiting = (
            instance.create_run_for_job(empty, status=dg.DagsterRunStatus.STARTED) for _ in range(2)
        )
        folder = liveness_folder(instance) / holder.run_id
        folder.mkdir(parents=True)
        (folder / "1-00.process").write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "another"}))
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        assert storage.claim_concurrency_slot("gpu", holder.run_id, "shop__lora").is_claimed
        assert not storage.claim_concurrency_slot("gpu", waiting.run_id, "pooled").is_claimed
        context = SimpleNamespace(
            instance=instance, run_id=waiting.run_id, log=log, for_step=lambda step: SimpleNamespace(log=log)
        )
        plan = SimpleNamespace(steps=[SimpleNamespace(key="pooled", pool="gpu")])
        wait_log = PoolWaitLog(context, plan)
        for _ in range(2):
            wait_log.check()
        (line,) = lines
        assert f"held by shop/lora of run {holder.run_id} (process 1 on elsewhere" in line
        assert "Force termination" in line
        assert not storage.claim_concurrency_slot("gpu", waiting.run_id, "pooled").is_claimed
        instance.report_run_canceled(holder)
        wait_log.check()
        assert storage.claim_concurrency_slot("gpu", waiting.run_id, "pooled").is_claimed
