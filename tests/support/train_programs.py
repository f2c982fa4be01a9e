"""Training runs in child processes, which can be killed, and reporters for them."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.runtime.stage_runner import EXIT_STOPPED, StopSignal
from sdxl_pipeline.training.logging.run_logs import read_metrics

REPOSITORY = Path(__file__).parents[2]
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["sdxl_pipeline.training.trainer", "sdxl_pipeline.stages.train"])


class RecordingReporter(Reporter):
    """Records log lines."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def _show_log(self, message: str) -> None:
        self.lines.append(message)


class StoppingReporter(RecordingReporter):
    """Records log lines, and requests a stop once `step` training steps are done; never if it is None."""

    def __init__(self, stop: StopSignal, step: int | None):
        super().__init__()
        self._stop, self._step = stop, step

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        if task == "train" and self._step is not None and done >= self._step:
            self._stop.request()


def with_settings(spec: TrainSpec, run: str, **settings: object) -> TrainSpec:
    """Return the spec with other settings and the run folder `run` in the same parent folder."""
    values = TrainingSettings(**{**spec.settings.model_dump(), **settings})
    return spec.model_copy(update={"settings": values, "run_dir": str(Path(spec.run_dir).with_name(run))})


def on_two_processes(spec: TrainSpec) -> TrainSpec:
    """Return the same run for two processes, to be started with TWO_PROCESSES."""
    return spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"num_processes": 2})})


def losses(manifest: TrainedLora) -> list[tuple[int, float]]:
    """Return (step, loss) of all steps."""
    return [(row.step, row.loss) for row in read_metrics(Path(manifest.metrics_path))]


def start(spec: TrainSpec, *launcher: str) -> subprocess.Popen[bytes]:
    """Start the train stage like users do."""
    spec_path = Path(spec.run_dir).with_suffix(".json")
    spec_path.write_text(spec.model_dump_json())
    command = [sys.executable, *launcher, "-m", "sdxl_pipeline.stages.train", str(spec_path)]
    return subprocess.Popen(
        [*command, "--manifest", str(_manifest_path(spec))],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(spec: TrainSpec, *launcher: str) -> TrainedLora:
    """Train in a child process to the end, and return the manifest."""
    process = start(spec, *launcher)
    output = finish(process)
    assert process.returncode == 0, output
    return TrainedLora.model_validate_json(_manifest_path(spec).read_bytes())


def finish(process: subprocess.Popen[bytes]) -> str:
    """Wait for the process and return its output."""
    return process.communicate(timeout=300)[0].decode()


def fork(spec: TrainSpec) -> list[BaseProcess]:
    """Start the processes of a training, forked from one with all imports done, in a tenth of the time of new processes.

    If there are several, each gets the environment variables that torchrun sets.
    """
    spec_path = Path(spec.run_dir).with_suffix(".json")
    spec_path.write_text(spec.model_dump_json())
    count = spec.hardware.num_processes
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environments = (
        [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)] if count > 1 else [{}]
    )
    processes: list[BaseProcess] = []
    for variables in environments:
        arguments = (str(spec_path), str(_manifest_path(spec)), variables)
        processes.append(_FORKSERVER.Process(target=_program, args=arguments))
        processes[-1].start()
    return processes


def run_forked(spec: TrainSpec) -> TrainedLora:
    """Train in forked processes to the end, and return the manifest."""
    processes = fork(spec)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return TrainedLora.model_validate_json(_manifest_path(spec).read_bytes())


def kill_after_checkpoint(spec: TrainSpec, number: signal.Signals, last: int) -> int:
    """Fork the run, send it a signal shortly after a random checkpoint of step `last` at most, and return that step."""
    processes = fork(spec)
    step = _wait_for_random_checkpoint(spec, last, lambda: all(process.is_alive() for process in processes))
    for process in processes:
        os.kill(process.pid or 0, number)
    for process in processes:
        process.join(timeout=120)
    expected = EXIT_STOPPED if number == signal.SIGTERM else -number
    assert {process.exitcode for process in processes} == {expected}, f"killed after step {step}"
    assert not (Path(spec.run_dir) / "finished.json").exists()
    return step


def kill_launcher_after_checkpoint(spec: TrainSpec, number: signal.Signals, last: int, *launcher: str) -> int:
    """Do the same with processes started by a launcher; SIGTERM goes to the launcher, which forwards it."""
    process = start(spec, *launcher)
    step = _wait_for_random_checkpoint(spec, last, lambda: process.poll() is None)
    launcher_process = psutil.Process(process.pid)
    # torchrun starts its workers in their own process groups
    killed = [launcher_process] if number == signal.SIGTERM else launcher_process.children(recursive=True)
    for each in killed:
        each.send_signal(number)
    output = finish(process)
    assert process.returncode != 0, f"killed after step {step}: {output}"
    assert not (Path(spec.run_dir) / "finished.json").exists()
    return step


def _wait_for_random_checkpoint(spec: TrainSpec, last: int, is_alive: Callable[[], bool]) -> int:
    interval = spec.settings.checkpoint_step_interval
    step = random.choice(range(interval, last + 1, interval))
    checkpoint = Path(spec.run_dir) / "checkpoints" / f"step-{step:08d}"
    while not checkpoint.exists():
        assert is_alive(), f"ended before step {step}"
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    return step


def _manifest_path(spec: TrainSpec) -> Path:
    return Path(spec.run_dir).with_suffix(".manifest.json")


def _program(spec_path: str, manifest_path: str, variables: Mapping[str, object]) -> None:
    import torch

    from sdxl_pipeline.runtime.stage_runner import run_stage
    from sdxl_pipeline.stages.train import main

    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    sys.argv = ["train", spec_path, "--manifest", manifest_path]
    run_stage(TrainSpec, main)
