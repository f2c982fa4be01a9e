"""Runs whose processes are gone give back their pool slots, and no process of a run outlives the run's own process.

Dagster knows a run by its events: one that is killed stays "started", and its step keeps its slot in the pool. Here every process of a
run holds a lock (see `sdxl_pipeline.runtime.process_liveness`), and whoever starts or waits looks for runs without any.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil

from sdxl_pipeline.runtime.process_liveness import (
    RUN_FOLDER_VARIABLE,
    RunProcesses,
    examined_runs,
    forget_run,
    hold_liveness,
    hold_liveness_of_environment,
)
from sdxl_pipeline.runtime.stage_runner import DEFAULT_STOP_TIMEOUT_SECONDS, is_resource_tracker

if TYPE_CHECKING:
    # Dagster exports neither these nor the types of an executor's arguments.
    from dagster._core.launcher.base import CheckRunHealthResult

FOLDER = "live_runs"
POLL_SECONDS = 2.0
REPEAT_SECONDS = 60.0
"""Between two log lines about the same wait."""

RUN_PID_VARIABLE = "SDXL_PIPELINE_RUN_PID"
STEP_GRACE_SECONDS = 5.0
"""How long a step without a stage may take to end after its run's process has died."""

_GONE = (
    "The processes of this run are gone without having reported an end: killed, out of memory, or a power cut. Materialize its assets "
    "again: what was finished is reused, and training resumes from its latest checkpoint."
)


def liveness_folder(instance: dg.DagsterInstance) -> Path:
    """Return the folder in which the runs of an instance hold their locks."""
    return Path(instance.root_directory).resolve() / FOLDER


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs as failed whose processes are all gone, free their pool slots, and return their ids.

    Runs of which nothing is known (another executor's, or another machine's) are left as they are.
    """
    folder = liveness_folder(instance)
    dead = []
    with examined_runs(folder) as runs:
        for run_id in [run.run_id for run in runs if run.is_dead]:
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished:
                if run.status == dg.DagsterRunStatus.CANCELING:
                    instance.report_run_canceled(run, _GONE)
                else:
                    instance.report_run_failed(run, _GONE)
                dead.append(run_id)
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
            forget_run(folder, run_id)
    return dead


def processes_of(instance: dg.DagsterInstance, run_id: str) -> RunProcesses:
    """Return what is known about the processes of a run."""
    with examined_runs(liveness_folder(instance)) as runs:
        return next((run for run in runs if run.run_id == run_id), RunProcesses(run_id, (), ()))


class LiveRunExecutor(dg.Executor):
    """Runs steps as `inner` does, after freeing what dead runs hold, and logs which run a step waits for."""

    def __init__(self, inner: dg.Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> Any:
        """The retry mode of the inner executor."""
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        """The dependency config of the inner executor."""
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[Any]:
        """Execute the plan."""
        run_folder = liveness_folder(plan_context.instance) / plan_context.run_id
        hold_liveness(run_folder)
        # Inherited by the fork server, its steps, and their stages.
        os.environ |= {RUN_FOLDER_VARIABLE: str(run_folder), RUN_PID_VARIABLE: str(os.getpid())}
        wait_log = PoolWaitLog(plan_context, execution_plan)
        wait_log.free_dead_runs()
        done = threading.Event()
        watcher = threading.Thread(target=wait_log.run_until, args=(done,), name="pool-wait", daemon=True)
        watcher.start()
        try:
            yield from self._inner.execute(plan_context, execution_plan)
        finally:
            done.set()
            watcher.join()


class PoolWaitLog:
    """Logs who holds the pool slots that steps of a run wait for, and frees those of dead runs."""

    def __init__(self, plan_context: Any, execution_plan: Any) -> None:
        self._context = plan_context
        self._instance: dg.DagsterInstance = plan_context.instance
        self._steps = {step.key: step for step in execution_plan.steps if step.pool}
        self._pools = sorted({step.pool for step in self._steps.values()})
        self._logged: dict[str, tuple[Any, float]] = {}

    def free_dead_runs(self) -> bool:
        """Free the slots of runs whose processes are gone, log which they were, and return whether there was one."""
        dead = fail_dead_runs(self._instance)
        for run_id in dead:
            self._context.log.info(
                f"Run {run_id} is marked as failed and its pool slots are free: all its processes are gone."
            )
        return bool(dead)

    def run_until(self, done: threading.Event) -> None:
        """Look every few seconds, as long as the run lasts."""
        while self._pools and not done.wait(POLL_SECONDS):
            try:
                self.look()
            except Exception as error:  # the run itself must not fail because its log of waiting does
                self._context.log.warning(f"Cannot see who holds the pools {self._pools}: {error!r}")
                done.wait(REPEAT_SECONDS)

    def look(self) -> None:
        """Log which runs hold the slots that steps of this run wait for, after freeing those of dead or ended runs."""
        own = self._context.run_id
        for pool, info in self._instance.event_log_storage.get_concurrency_infos(self._pools).items():
            waiting = [
                step
                for step in info.pending_steps
                if step.run_id == own and step.assigned_timestamp is None and step.step_key in self._steps
            ]
            if not waiting:
                continue
            if self.free_dead_runs():
                return  # `info` is out of date
            holders = {(slot.run_id, slot.step_key) for slot in info.claimed_slots}
            holders |= {
                (step.run_id, step.step_key) for step in info.pending_steps if step.assigned_timestamp
            }
            for run_id in {run_id for run_id, _ in holders if run_id != own}:
                self._free_if_finished(run_id)
            for step in waiting:
                self._log_wait(step.step_key, pool, sorted(holders))

    def _free_if_finished(self, run_id: str) -> None:
        """Free the slots of a run that has ended, was terminated by force or deleted, and of which no process is seen."""
        run = self._instance.get_run_by_id(run_id)
        if (run is None or run.is_finished) and not processes_of(self._instance, run_id).alive:
            self._instance.event_log_storage.free_concurrency_slots_for_run(run_id)

    def _log_wait(self, step_key: str, pool: str, holders: list[tuple[str, str]]) -> None:
        before, logged_at = self._logged.get(step_key, (None, 0.0))
        if holders and (holders != before or time.monotonic() - logged_at > REPEAT_SECONDS):
            self._logged[step_key] = (holders, time.monotonic())
            held = "; ".join(self._describe(run_id, key) for run_id, key in holders)
            log = self._context.for_step(self._steps[step_key]).log
            log.info(f"Waiting for a slot in pool {pool}, which is held by {held}.")

    def _describe(self, run_id: str, step_key: str) -> str:
        asset = step_key.replace("__", "/")
        (stats,) = self._instance.get_run_step_stats(run_id, [step_key]) or (None,)
        since = (
            f" since {datetime.fromtimestamp(stats.start_time).astimezone():%Y-%m-%d %H:%M:%S %Z}"
            if stats and stats.start_time
            else ""
        )
        if run_id == self._context.run_id:
            return f"this run's {asset}{since}"
        processes = processes_of(self._instance, run_id)
        seen = [*processes.alive, *processes.unknown] or ["its processes cannot be seen from here"]
        if not processes.alive:
            seen.append("if they are gone, terminate the run in the UI with 'Force termination'")
        return f"{asset} of run {run_id}{since} ({'; '.join(seen)})"


@dg.executor(
    name="multiprocess",
    config_schema=dg.multiprocess_executor.config_schema.as_field(),
    requirements=dg.multiple_process_executor_requirements(),
)
def live_run_executor(init_context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's multiprocess executor, for runs that know of dead ones."""
    create = dg.multiprocess_executor.executor_creation_fn
    assert create is not None
    return LiveRunExecutor(create(init_context))


class LiveRunLauncher(dg.DefaultRunLauncher):
    """Dagster's default launcher, which can tell its monitoring daemon that a run's processes are gone."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """True: see `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> "CheckRunHealthResult":
        """Report a run as failed, and free its pool slots, when it is known that no process of it is left, whoever started it."""
        from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus

        instance = self._instance
        with examined_runs(liveness_folder(instance)) as runs:
            if any(found.is_dead for found in runs if found.run_id == run.run_id):
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
                return CheckRunHealthResult(WorkerStatus.FAILED, _GONE)
        return CheckRunHealthResult(WorkerStatus.RUNNING)


@cache
def follow_run_process() -> None:
    """In a step's process: count it among those of its run, and end it when the run's own process dies.

    Does nothing elsewhere. Only the multiprocessing sentinel tells of that death: the parent by pid is the fork server, which lives as
    long as its children do. Without this a step goes on for hours, and then blocks for ever on the pipe of a reader that is gone.
    """
    parent = multiprocessing.parent_process()
    if parent is None or str(parent.pid) != os.environ.get(RUN_PID_VARIABLE):
        return
    hold_liveness_of_environment()
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="watch-run", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    # As when the run is terminated: the launcher stops its stage at a safe point.
    os.kill(os.getpid(), signal.SIGINT)
    begun = time.monotonic()
    idle_since = begun
    while time.monotonic() - idle_since < STEP_GRACE_SECONDS:
        time.sleep(0.2)
        if time.monotonic() - begun < 2 * DEFAULT_STOP_TIMEOUT_SECONDS and _has_children():
            idle_since = time.monotonic()
    os._exit(1)  # an orderly exit would wait for the pipe


def _has_children() -> bool:
    return any(
        child.status() != psutil.STATUS_ZOMBIE and not is_resource_tracker(child)
        for child in psutil.Process().children()
    )
