"""Liveness of a run's processes: each holds a lock on its own file, in a folder per run.

<folder>/.lock                    held while a file is added and locked, or the files are inspected
<folder>/<run id>/<name>.process  locked by one process of the run until that process ends, however it ends

The kernel releases a lock with its process, so reused pids and separate pid namespaces of containers cannot mislead. The file system may
not share locks with another machine, so a process there counts as alive.
"""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

RUN_FOLDER_VARIABLE = "SDXL_PIPELINE_RUN_FOLDER"
"""Environment variable with the folder of a process's run; inherited by steps and stages."""

_SUFFIX = ".process"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_held_locks: dict[Path, int] = {}


@dataclass(frozen=True)
class RunProcesses:
    """Known state of the processes of one run."""

    run_id: str
    alive: tuple[str, ...]
    """Descriptions of the processes that hold their lock."""
    unknown: tuple[str, ...]
    """Descriptions of processes on other machines, whose locks may be invisible here."""

    @property
    def is_dead(self) -> bool:
        """Whether every process of the run is known to have ended."""
        return not self.alive and not self.unknown


def hold_liveness(run_folder: Path) -> None:
    """Register this process as part of the run until it ends. Idempotent."""
    if run_folder in _held_locks:
        return
    run_folder.mkdir(parents=True, exist_ok=True)
    about = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot_id()}
    path = run_folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    with _locked(run_folder.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        lock_descriptor(descriptor)
        os.write(descriptor, json.dumps(about).encode())
    _held_locks[run_folder] = descriptor  # never closed: the lock ends with the process


def hold_liveness_from_environment() -> None:
    """Register this process as part of the run in the environment, if there is one."""
    if folder := os.environ.get(RUN_FOLDER_VARIABLE):
        hold_liveness(Path(folder))


@contextmanager
def inspect_runs(folder: Path) -> Iterator[list[RunProcesses]]:
    """Yield the processes of every run in `folder`; while the block runs, no process joins a run.

    A run without files is omitted: nothing is known about it.
    """
    if not folder.is_dir():
        yield []
        return
    with _locked(folder):
        yield [
            _inspect(run.name, files)
            for run in sorted(folder.iterdir())
            if run.is_dir() and (files := sorted(run.glob(f"*{_SUFFIX}")))
        ]


def forget_run(folder: Path, run_id: str) -> None:
    """Delete the files of a run whose processes have all ended."""
    shutil.rmtree(folder / run_id, ignore_errors=True)


def _inspect(run_id: str, files: Sequence[Path]) -> RunProcesses:
    alive, unknown = [], []
    for path in files:
        with path.open("r+b") as file:
            lock_is_free = lock_descriptor(file.fileno(), blocking=False)
            content = file.read()
        about = {"pid": "unknown", "host": socket.gethostname(), "boot": ""}
        with suppress(ValueError, TypeError):
            about |= json.loads(content)
        is_local = about["host"] == socket.gethostname() or (about["boot"] and about["boot"] == _boot_id())
        if not lock_is_free:
            alive.append(f"process {about['pid']} on {about['host']}")
        elif not is_local:
            unknown.append(f"process {about['pid']} on {about['host']}, which cannot be inspected from here")
    return RunProcesses(run_id, tuple(alive), tuple(unknown))


def _boot_id() -> str:
    """Return the kernel's boot id, which containers of a machine share; empty where the system has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as lock:
        lock_descriptor(lock.fileno())
        yield
