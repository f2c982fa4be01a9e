"""The client that runs a stage on this machine, in a process of its own.

A child process frees its device memory when it ends, and a CUDA crash fails the step instead of killing the worker. `accelerate launch`
is not used: it does not forward the stop signal and leaves the training running.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import dagster as dg
from dagster_pipes import PipesExtras
from pydantic import BaseModel, Field

import sdxl_pipeline
from resources.message_relay import MessageRelay
from resources.process_group import ProcessGroup, interrupts_ignored
from resources.storage import full_disk_as_failure
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.stage_runner import (
    EXIT_DONE,
    EXIT_STOPPED,
    PARENT_PID_VARIABLE,
    STOP_TIMEOUT_VARIABLE,
    StageFailure,
    error_path,
)

ManifestT = TypeVar("ManifestT", bound=BaseModel)

POLL_SECONDS = 0.5
REPOSITORY = Path(sdxl_pipeline.__file__).parents[1]
DISTRIBUTED_STAGES = ("train", "encode_latents", "encode_text")

EXIT_CODE = "exit_code"
"""Metadata entry of an invocation with the child's exit code; negative: killed by that signal."""

# Progress bars of libraries fill a log with thousands of lines; the stages report progress themselves. Values set by the user win.
QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}

OUT_OF_MEMORY_ADVICE = (
    "The device has too little memory for this. Lower train_batch_size (raising gradient_accumulation_steps keeps the effective batch), set "
    "gradient_checkpointing to true, lower vae_batch_size if the VAE failed, or choose a smaller hardware profile."
)


class LocalStageClient(dg.ConfigurableResource, dg.PipesClient):
    """Runs a stage as a child process of the step, on this machine: plain Python for one device, torchrun for several."""

    stop_timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a stopped stage has to reach a safe point (a checkpoint of the current step) before it is killed. "
        "Keep it below run_monitoring.cancel_timeout_seconds in dagster.yaml.",
    )
    progress_log_seconds: float = Field(
        default=10.0, ge=0, description="Seconds between two progress lines of one task in the event log."
    )
    metric_points: int = Field(
        default=100,
        ge=2,
        description="Approximate number of points of a training curve in the asset's plots.",
    )

    def run(  # type: ignore[override]  # the base class declares **kwargs for a client's own arguments
        self,
        *,
        context: dg.OpExecutionContext | dg.AssetExecutionContext,
        extras: PipesExtras | None = None,
        module: str,
        arguments: Sequence[str] = (),
        num_processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """Run `python -m <module> <arguments>` to its end, relaying its Pipes messages; `exit_code` is in the result's metadata.

        When the run is interrupted, or anything else is raised here, the child's whole process group is stopped first: after this
        call, however it ends, no process of the stage is left. (Dagster itself starts an interrupted step again when its asset has
        a RetryPolicy and the run has one process.)
        """
        name = module.rpartition(".")[2]
        command = self._command(module, num_processes, arguments)
        relay = MessageRelay(context, self.progress_log_seconds, self.metric_points)
        with dg.open_pipes_session(
            context=context,
            extras=extras,
            context_injector=dg.PipesEnvContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session:
            group = ProcessGroup(
                command, self._environment({**session.get_bootstrap_env_vars(), **(environment or {})})
            )
            try:
                context.log.info(f"Stage {name} runs as process {group.leader.pid}: {' '.join(command)}")
                while (exit_code := group.wait(POLL_SECONDS)) is None:
                    relay.relay(session.get_custom_messages())
                group.end_rest()
            except BaseException as interruption:
                with interrupts_ignored():
                    try:
                        context.log.info(
                            f"{type(interruption).__name__}: stopping stage {name} (process {group.leader.pid}) at a safe point, "
                            f"within {self.stop_timeout_seconds:g} s."
                        )
                    finally:
                        group.stop(self.stop_timeout_seconds)
                raise
        relay.relay(session.get_custom_messages())
        relay.finish()
        return dg.PipesClientCompletedInvocation(session, metadata={EXIT_CODE: exit_code})

    def run_stage(
        self,
        context: dg.AssetExecutionContext,
        stage: str,
        spec: BaseModel,
        manifest_type: type[ManifestT],
        work_dir: Path,
        hardware: Hardware,
        environment: Mapping[str, str] | None = None,
    ) -> ManifestT:
        """Run a stage with a spec and return its manifest.

        `stage` is the name of a module in `sdxl_pipeline.stages`, or a dotted module path. While the stage runs, the names of spec and
        manifest in `work_dir` contain the run's id, so that concurrent runs do not read each other's; afterwards they are
        `<stage>.spec.json` and `<stage>.manifest.json`, the record of the last run. `environment` is added to the child's. The calling
        asset has to return a `MaterializeResult`, as with every Pipes session.

        Raise `dagster.Failure`, without retries when the stage reports an error that the user has to fix or that memory does not
        suffice.
        """
        module = stage if "." in stage else f"sdxl_pipeline.stages.{stage}"
        name = module.rpartition(".")[2]
        spec_path = work_dir.resolve() / f"{name}.{context.run_id}.spec.json"
        manifest_path = spec_path.with_name(f"{name}.{context.run_id}.manifest.json")
        with full_disk_as_failure():
            write_text_atomic(spec_path, spec.model_dump_json(indent=2) + "\n")
        try:
            invocation = self.run(
                context=context,
                module=module,
                arguments=[str(spec_path), "--manifest", str(manifest_path)],
                num_processes=hardware.num_processes if name in DISTRIBUTED_STAGES else 1,
                environment=environment,
            )
            exit_code = int(str(invocation.metadata[EXIT_CODE].value))
            if exit_code != EXIT_DONE:
                raise _failure(name, exit_code, manifest_path)
            return manifest_type.model_validate_json(manifest_path.read_bytes())
        finally:
            for path, record in (
                (spec_path, "spec"),
                (manifest_path, "manifest"),
                (error_path(manifest_path), "error"),
            ):
                with suppress(FileNotFoundError):
                    path.replace(work_dir / f"{name}.{record}.json")

    def _command(self, module: str, num_processes: int, arguments: Sequence[str]) -> list[str]:
        if num_processes == 1:
            return [sys.executable, "-m", module, *arguments]
        torchrun = [
            "--standalone",
            f"--nproc-per-node={num_processes}",
            f"--shutdown-timeout={max(1, round(self.stop_timeout_seconds))}",
        ]
        return [sys.executable, "-m", "sdxl_pipeline.runtime.torchrun", *torchrun, "-m", module, *arguments]

    def _environment(self, additions: Mapping[str, str]) -> dict[str, str]:
        """Return this process's environment with `additions`. Hub and tracker tokens are passed this way and never written to a spec."""
        search_path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **QUIET_LIBRARIES,
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search_path),
            "PYTHONUNBUFFERED": "1",
            PARENT_PID_VARIABLE: str(os.getpid()),
            STOP_TIMEOUT_VARIABLE: f"{self.stop_timeout_seconds:g}",
            **additions,
        }


def _failure(name: str, exit_code: int, manifest_path: Path) -> dg.Failure:
    """Return the failure of a stage that did not succeed, with a message for the run's page."""
    if exit_code == EXIT_STOPPED:
        return dg.Failure(
            f"Stage {name} was stopped from outside, at a safe point. Materialize this asset again to resume."
        )
    if exit_code < 0:
        signal_name = signal.Signals(-exit_code).name
        cause = (
            " Often the kernel does this when the machine runs out of memory."
            if signal_name == "SIGKILL"
            else ""
        )
        return dg.Failure(
            f"Stage {name} was killed by {signal_name}.{cause} Its last lines are in stdout and stderr."
        )
    path = error_path(manifest_path)
    if not path.exists():
        return dg.Failure(
            f"Stage {name} ended with exit code {exit_code}; see stdout and stderr of this step."
        )
    failure = StageFailure.model_validate_json(path.read_bytes())
    if failure.kind == "user":
        return dg.Failure(failure.message, allow_retries=False)
    if failure.kind == "out_of_memory":
        return dg.Failure(f"Stage {name}: {failure.message}\n{OUT_OF_MEMORY_ADVICE}", allow_retries=False)
    return dg.Failure(
        f"Stage {name} failed: {failure.message}",
        metadata={"traceback": dg.MetadataValue.md(f"```\n{failure.traceback}\n```")},
    )
