"""Frees the pool slots of runs whose processes have died, and ends a run's processes with the run's own process.

Dagster tracks a run by its events: a killed run stays "started", and its step keeps its pool slot. Here every process of a run holds a
lock (see `sdxl_pipeline.runtime.process_liveness`), and every run that starts or waits searches for runs without a live process.
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
    forget_run,
    hold_liveness,
    hold_liveness_from_environment,
    inspect_runs,
)
from sdxl_pipeline.runtime.stage_runner import DEFAULT_STOP_TIMEOUT_SECONDS, is_resource_tracker

if TYPE_CHECKING:
    # Dagster exports neither these nor the types of an executor's arguments.
    from dagster._core.launcher.base import CheckRunHealthResult

FOLDER = "live_runs"
POLL_SECONDS = 2.0
REPEAT_SECONDS = 60.0
"""Interval between two log lines about the same wait."""

RUN_PID_VARIABLE = "SDXL_PIPELINE_RUN_PID"
STEP_GRACE_SECONDS = 5.0
"""Time that a step without a stage has to end after its run's process has died."""

_DEAD_RUN = (
    "The processes of this run ended without reporting it: killed, out of memory, or a power failure. Materialize its assets "
    "again: finished work is reused, and training resumes from its latest checkpoint."
)


def liveness_folder(instance: dg.DagsterInstance) -> Path:
    """Return the folder in which the runs of an instance hold their locks."""
    return Path(instance.root_directory).resolve() / FOLDER


def fail_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs without a live process as failed, free their pool slots, and return their ids.

    Runs without recorded processes (of another executor or machine) are not changed.
    """
    folder = liveness_folder(instance)
    dead = []
    with inspect_runs(folder) as runs:
        for run_id in [run.run_id for run in runs if run.is_dead]:
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished:
                if run.status == dg.DagsterRunStatus.CANCELING:
                    instance.report_run_canceled(run, _DEAD_RUN)
                else:
                    instance.report_run_failed(run, _DEAD_RUN)
                dead.append(run_id)
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
            forget_run(folder, run_id)
    return dead


def processes_of(instance: dg.DagsterInstance, run_id: str) -> RunProcesses:
    """Return the recorded processes of a run."""
    with inspect_runs(liveness_folder(instance)) as runs:
        return next((run for run in runs if run.run_id == run_id), RunProcesses(run_id, (), ()))


class LiveRunExecutor(dg.Executor):
    """Runs steps with the executor `inner`, after freeing the slots of dead runs, and logs which run a step waits for."""

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
    """Logs which runs hold the pool slots that steps of a run wait for, and frees those of dead runs."""

    def __init__(self, plan_context: Any, execution_plan: Any) -> None:
        self._context = plan_context
        self._instance: dg.DagsterInstance = plan_context.instance
        self._steps = {step.key: step for step in execution_plan.steps if step.pool}
        self._pools = sorted({step.pool for step in self._steps.values()})
        self._logged: dict[str, tuple[Any, float]] = {}

    def free_dead_runs(self) -> bool:
        """Free the slots of runs without a live process, log their ids, and return whether there was one."""
        dead = fail_dead_runs(self._instance)
        for run_id in dead:
            self._context.log.info(
                f"Run {run_id} is marked as failed and its pool slots are free: none of its processes is alive."
            )
        return bool(dead)

    def run_until(self, done: threading.Event) -> None:
        """Check every few seconds until `done` is set."""
        while self._pools and not done.wait(POLL_SECONDS):
            try:
                self.check()
            except Exception as error:  # an error in this log must not fail the run
                self._context.log.warning(f"Cannot read which runs hold the pools {self._pools}: {error!r}")
                done.wait(REPEAT_SECONDS)

    def check(self) -> None:
        """Log which runs hold the slots that steps of this run wait for, after freeing those of dead or finished runs."""
        own_run_id = self._context.run_id
        for pool, info in self._instance.event_log_storage.get_concurrency_infos(self._pools).items():
            waiting = [
                step
                for step in info.pending_steps
                if step.run_id == own_run_id
                and step.assigned_timestamp is None
                and step.step_key in self._steps
            ]
            if not waiting:
                continue
            if self.free_dead_runs():
                return  # `info` is out of date
            holders = {(slot.run_id, slot.step_key) for slot in info.claimed_slots}
            holders |= {
                (step.run_id, step.step_key) for step in info.pending_steps if step.assigned_timestamp
            }
            for run_id in {run_id for run_id, _ in holders if run_id != own_run_id}:
                self._free_if_finished(run_id)
            for step in waiting:
                self._log_wait(step.step_key, pool, sorted(holders))

    def _free_if_finished(self, run_id: str) -> None:
        """Free the slots of a run that is finished, force-terminated or deleted, and has no live process."""
        run = self._instance.get_run_by_id(run_id)
        if (run is None or run.is_finished) and not processes_of(self._instance, run_id).alive:
            self._instance.event_log_storage.free_concurrency_slots_for_run(run_id)

    def _log_wait(self, step_key: str, pool: str, holders: list[tuple[str, str]]) -> None:
        logged_holders, logged_at = self._logged.get(step_key, (None, 0.0))
        if holders and (holders != logged_holders or time.monotonic() - logged_at > REPEAT_SECONDS):
            self._logged[step_key] = (holders, time.monotonic())
            descriptions = "; ".join(self._describe(run_id, key) for run_id, key in holders)
            log = self._context.for_step(self._steps[step_key]).log
            log.info(f"Waiting for a slot in pool {pool}, which is held by {descriptions}.")

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
        known = [*processes.alive, *processes.unknown] or ["its processes are not visible from this machine"]
        if not processes.alive:
            known.append("if they have ended, terminate the run in the UI with 'Force termination'")
        return f"{asset} of run {run_id}{since} ({'; '.join(known)})"


@dg.executor(
    name="multiprocess",
    config_schema=dg.multiprocess_executor.config_schema.as_field(),
    requirements=dg.multiple_process_executor_requirements(),
)
def live_run_executor(init_context: dg.InitExecutorContext) -> dg.Executor:
    """Return Dagster's multiprocess executor wrapped in `LiveRunExecutor`."""
    create = dg.multiprocess_executor.executor_creation_fn
    assert create is not None
    return LiveRunExecutor(create(init_context))


class LiveRunLauncher(dg.DefaultRunLauncher):
    """Dagster's default launcher, with a health check that reports runs without a live process to the monitoring daemon."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Return True: see `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> "CheckRunHealthResult":
        """Return FAILED, and free the pool slots, for a run whose recorded processes are all dead, however it was started."""
        from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus

        instance = self._instance
        with inspect_runs(liveness_folder(instance)) as runs:
            if any(found.is_dead for found in runs if found.run_id == run.run_id):
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
                return CheckRunHealthResult(WorkerStatus.FAILED, _DEAD_RUN)
        return CheckRunHealthResult(WorkerStatus.RUNNING)


@cache
def follow_run_process() -> None:
    """Register a step's process as one of its run, and end it when the run's own process dies.

    Does nothing in other processes. Only the multiprocessing sentinel signals that death: the parent by pid is the fork server, which
    lives as long as its children. Otherwise a step continues for hours and then blocks forever on a pipe without a reader.
    """
    parent = multiprocessing.parent_process()
    if parent is None or str(parent.pid) != os.environ.get(RUN_PID_VARIABLE):
        return
    hold_liveness_from_environment()
    threading.Thread(target=_end_with, args=(parent.sentinel,), name="watch-run", daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    # The same signal as on termination of the run: the stage client stops its stage at a safe point.
    os.kill(os.getpid(), signal.SIGINT)
    started = time.monotonic()
    childless_since = started
    while time.monotonic() - childless_since < STEP_GRACE_SECONDS:
        time.sleep(0.2)
        if time.monotonic() - started < 2 * DEFAULT_STOP_TIMEOUT_SECONDS and _has_children():
            childless_since = time.monotonic()
    os._exit(1)  # a regular exit would wait for the pipe


def _has_children() -> bool:
    return any(
        child.status() != psutil.STATUS_ZOMBIE and not is_resource_tracker(child)
        for child in psutil.Process().children()
    )
