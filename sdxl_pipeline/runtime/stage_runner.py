"""The frame of every stage program: read the spec, stop safely, write a manifest or an error.

    if __name__ == "__main__":
        run_stage(EncodeLatentsSpec, main)

    python -m sdxl_pipeline.stages.encode_latents spec.json [--manifest manifest.json]

Contract with the launcher:

- exit code 0: the work is done; the manifest, written last and atomically, describes the result;
- exit code 143: a stop was requested (SIGTERM, SIGINT), and the stage stopped at a point from which the next run resumes;
- exit code 1: it failed; an error file beside the manifest gives the reason (`StageFailure`).

A stage never outlives its launcher: when that dies, even by SIGKILL, the stage stops as if requested, and is killed if it does not.

Manifests of finished stages are also written beside their results (`write_finished`) and reused by identity (`read_finished`).
"""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeVar

from filelock import lock_descriptor
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.files.disk_space import describe_disk_full, is_disk_full
from sdxl_pipeline.files.storage_errors import StorageError
from sdxl_pipeline.runtime.process_liveness import hold_liveness_from_environment
from sdxl_pipeline.runtime.reporter import Reporter, is_main_process, open_reporter

if TYPE_CHECKING:
    import psutil

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 128 + signal.SIGTERM

# Set by the launcher. Compared with the actual parent, which may have died before this process called prctl.
PARENT_PID_VARIABLE = "SDXL_PIPELINE_PARENT_PID"
STOP_TIMEOUT_VARIABLE = "SDXL_PIPELINE_STOP_TIMEOUT"
DEFAULT_STOP_TIMEOUT_SECONDS = 120.0

PARENT_POLL_SECONDS = 1.0
LOCK_POLL_SECONDS = 0.5
LOCK_TIMEOUT_SECONDS = 180.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

SpecT = TypeVar("SpecT", bound=BaseModel)
ManifestT = TypeVar("ManifestT", bound=BaseModel)


class UserError(Exception):
    """A failure that the user can fix. Only the message is displayed, so it describes the problem and the fix."""


class StageStopped(Exception):  # noqa: N818  # not an error
    """A stop was requested, and the stage has reached a safe point."""


class StageFailure(BaseModel):
    """The error file of a failed stage, read by the launcher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["user", "out_of_memory", "crash"] = Field(
        description="user: a UserError, which a retry does not fix; out_of_memory: of the device; crash: anything else."
    )
    message: str
    traceback: str = Field(default="", description="Empty for a UserError.")


class StopSignal:
    """Whether a stop was requested. A stage checks it wherever stopping loses nothing."""

    def __init__(self) -> None:
        self._requested = False

    @property
    def requested(self) -> bool:
        """True from the first SIGTERM or SIGINT on."""
        return self._requested

    def request(self) -> None:
        """Request a stop at the next safe point. Idempotent, so a save in progress is never interrupted."""
        self._requested = True

    def raise_if_requested(self) -> None:
        """Raise StageStopped if a stop was requested."""
        if self._requested:
            raise StageStopped


def error_path(manifest_path: Path) -> Path:
    """Return the path of a failed stage's StageFailure."""
    return manifest_path.with_suffix(".error.json")


def finished_path(result: Path) -> Path:
    """Return the path of a result's finished manifest."""
    return result.with_suffix(".finished.json")


def read_finished(result: Path, manifest_type: type[ManifestT], identity: str) -> ManifestT | None:
    """Return the manifest beside `result` if its `identity` is this one and all files in its `*_path` fields exist; else None."""
    try:
        manifest = manifest_type.model_validate_json(finished_path(result).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    fields = manifest.model_dump()
    paths = [value for name, value in fields.items() if name.endswith("_path") and value is not None]
    return manifest if fields["identity"] == identity and all(Path(path).exists() for path in paths) else None


def write_finished(result: Path, manifest: BaseModel) -> None:
    """Write a manifest beside its result."""
    write_text_atomic(finished_path(result), manifest.model_dump_json(indent=1) + "\n")


def run_stage(
    spec_type: type[SpecT], work: Callable[[SpecT, Reporter, StopSignal], BaseModel | None]
) -> None:
    """Run a stage as a program: arguments from sys.argv, result as the exit code. Never returns.

    With several processes only rank 0's manifest is written; the others may return None.
    """
    sys.exit(_run(spec_type, work, sys.argv[1:]))


def _run(
    spec_type: type[SpecT],
    work: Callable[[SpecT, Reporter, StopSignal], BaseModel | None],
    arguments: list[str],
) -> int:
    follows_parent = follow_parent()
    stop = StopSignal()
    _install_handlers(stop)
    parser = argparse.ArgumentParser(prog=f"python -m {_module_name()}", description=work.__doc__)
    parser.add_argument("spec", type=Path, help=f"JSON of a {spec_type.__name__}")
    parser.add_argument(
        "--manifest", type=Path, help="JSON to write when done; default: manifest.json beside the spec"
    )
    parsed = parser.parse_args(arguments)
    manifest_path: Path = parsed.manifest or parsed.spec.with_name("manifest.json")
    try:
        with open_reporter() as reporter:
            return _run_work(spec_type, work, parsed.spec, manifest_path, reporter, stop)
    finally:
        if follows_parent:
            _end_descendants()


def _run_work(
    spec_type: type[SpecT],
    work: Callable[[SpecT, Reporter, StopSignal], BaseModel | None],
    spec_path: Path,
    manifest_path: Path,
    reporter: Reporter,
    stop: StopSignal,
) -> int:
    """Do the work and convert whatever it raises to an exit code and a StageFailure."""
    try:
        with _exclusive(manifest_path, reporter, stop):
            spec = spec_type.model_validate_json(spec_path.read_bytes())
            _limit_threads(spec)
            manifest = work(spec, reporter, stop)
            if is_main_process():
                assert manifest is not None, "rank 0 of a stage returns its manifest"
                write_text_atomic(manifest_path, manifest.model_dump_json(indent=2) + "\n")
        return EXIT_DONE
    except StageStopped:
        reporter.log("Stopped at a safe point; the next run resumes from here.")
        return EXIT_STOPPED
    except (UserError, StorageError) as error:  # a store's errors contain the fix as well
        sys.stderr.write(f"{error}\n")
        _write_failure(manifest_path, StageFailure(kind="user", message=str(error)))
        return EXIT_FAILED
    except Exception as error:
        if is_disk_full(error):
            message = describe_disk_full(
                error, manifest_path.parent, f"what the stage {_module_name()} writes"
            )
            sys.stderr.write(f"{message}\n")
            _write_failure(manifest_path, StageFailure(kind="user", message=message))
            return EXIT_FAILED
        traceback.print_exc()
        # torch.OutOfMemoryError and subclasses, compared by name so that stages without torch need not import it
        kind: Literal["out_of_memory", "crash"] = (
            "out_of_memory" if type(error).__name__ == "OutOfMemoryError" else "crash"
        )
        message = f"{type(error).__name__}: {error}"
        _write_failure(
            manifest_path, StageFailure(kind=kind, message=message, traceback=traceback.format_exc())
        )
        return EXIT_FAILED


def _write_failure(manifest_path: Path, failure: StageFailure) -> None:
    """Write the failure of the first rank that fails: others often fail only because it exited."""
    path = error_path(manifest_path)
    if is_main_process() or not path.exists():
        write_text_atomic(path, failure.model_dump_json(indent=2) + "\n")


def follow_parent() -> bool:
    """Tie this process's lifetime to its launcher's. Return False when it was started by hand.

    On Linux the kernel sends SIGTERM when the parent dies. A thread handles the rest: systems without that, and a stage that does not
    reach a safe point in time.
    """
    expected = os.environ.get(PARENT_PID_VARIABLE)
    if expected is None:
        return False
    if sys.platform == "linux":
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = int(expected)
    if os.getppid() != parent:
        sys.exit(EXIT_STOPPED)  # the parent died before the prctl call
    hold_liveness_from_environment()
    timeout = float(os.environ.get(STOP_TIMEOUT_VARIABLE, DEFAULT_STOP_TIMEOUT_SECONDS))
    threading.Thread(target=_watch_parent, args=(parent, timeout), name="watch-parent", daemon=True).start()
    return True


def _watch_parent(parent: int, timeout: float) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(timeout)
    _end_descendants()
    os.kill(os.getpid(), signal.SIGKILL)


def _install_handlers(stop: StopSignal) -> None:
    own_pid = os.getpid()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own_pid:
            return  # a forked loader worker, which must serve until this process is done with it
        stop.request()
        # os.write rather than a stream: the signal may have interrupted a print
        os.write(
            2,
            f"{signal.Signals(number).name}: stopping at the next safe point (pid {os.getpid()})\n".encode(),
        )

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


@contextmanager
def _exclusive(manifest_path: Path, reporter: Reporter, stop: StopSignal) -> Iterator[None]:
    """Hold the lock on a stage's folder, and delete what an earlier attempt of this run left there.

    A retry may start while the stage of a killed worker is still saving, and waits for it to end. The kernel releases the lock with the
    process, so a dead one never blocks.
    """
    if not is_main_process():
        yield
        return
    manifest_path.parent.mkdir(parents=True, exist_ok=True)
    with manifest_path.with_name(f"{_module_name().rpartition('.')[2]}.lock").open("a") as lock:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        waiting = False
        while not lock_descriptor(lock.fileno(), blocking=False):
            stop.raise_if_requested()
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process is still working on {manifest_path.parent} (it holds {lock.name}); "
                    "wait for that run to end, or stop it, and run this again"
                )
            if not waiting:
                reporter.log(f"Waiting for another process that is still working on {manifest_path.parent}.")
                waiting = True
            time.sleep(LOCK_POLL_SECONDS)
        manifest_path.unlink(missing_ok=True)
        error_path(manifest_path).unlink(missing_ok=True)
        yield


def _limit_threads(spec: BaseModel) -> None:
    threads = getattr(getattr(spec, "hardware", None), "cpu_threads", None)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _end_descendants() -> None:
    """Kill the child processes that this process did not end itself: loader workers, helpers of libraries."""
    import psutil

    remaining = [
        process for process in psutil.Process().children(recursive=True) if not is_resource_tracker(process)
    ]
    for process in remaining:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(remaining, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def is_resource_tracker(process: "psutil.Process") -> bool:
    """Return whether a process is multiprocessing's resource tracker, which cleans up shared memory after its parent and ignores SIGTERM."""
    import psutil

    try:
        return any("multiprocessing.resource_tracker" in argument for argument in process.cmdline())
    except psutil.NoSuchProcess:
        return True


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem
