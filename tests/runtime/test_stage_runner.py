"""Stage programs as seen by their launcher: exit codes, manifest, error file and stopping, all with real processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.stage_runner import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    PARENT_PID_VARIABLE,
    STOP_TIMEOUT_VARIABLE,
    StageFailure,
    StageStopped,
    StopSignal,
    error_path,
)
from tests.stages.sleepy_stage import SleepySpec
from tests.support.processes import runs, wait_for, wait_for_number

REPOSITORY = Path(__file__).parents[2]
STAGE = [sys.executable, "-m", "tests.stages.sleepy_stage"]


def start_stage(spec: SleepySpec, command: list[str] = STAGE, **environment: str) -> subprocess.Popen:
    """Start a stage in a working directory outside the repository."""
    (spec.folder / "spec.json").write_text(spec.model_dump_json())
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {PARENT_PID_VARIABLE, STOP_TIMEOUT_VARIABLE, "RANK"}
    }
    return subprocess.Popen(
        [*command, str(spec.folder / "spec.json"), "--manifest", str(manifest_path(spec))],
        cwd=spec.folder,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def manifest_path(spec: SleepySpec) -> Path:
    return spec.folder / "sleepy.manifest.json"


def read_failure(spec: SleepySpec) -> StageFailure:
    return StageFailure.model_validate_json(error_path(manifest_path(spec)).read_bytes())


def test_run_stage_writes_its_manifest_and_exits_0(tmp_path):
    spec = SleepySpec(folder=tmp_path)
    stage = start_stage(spec)
    out, _ = stage.communicate(timeout=60)
    assert stage.returncode == EXIT_DONE
    assert json.loads(manifest_path(spec).read_text())["steps"] == 5
    assert "count: 5 of 5 steps (100 %)" in out


def test_run_stage_without_manifest_argument_writes_it_beside_the_spec(tmp_path):
    (tmp_path / "spec.json").write_text(SleepySpec(folder=tmp_path).model_dump_json())
    subprocess.run([*STAGE, str(tmp_path / "spec.json")], check=True, cwd=REPOSITORY, timeout=60)
    assert json.loads((tmp_path / "manifest.json").read_text())["steps"] == 5


@pytest.mark.parametrize(
    ("ending", "message"),
    [("user", "steps: 7 is unlucky; write 8"), ("store", "no space left on the moon")],
)
def test_run_stage_with_a_user_error_prints_its_message_without_traceback(tmp_path, ending, message):
    spec = SleepySpec(folder=tmp_path, ending=ending)
    stage = start_stage(spec)
    _, err = stage.communicate(timeout=60)
    assert stage.returncode == EXIT_FAILED
    assert err.strip() == message
    assert read_failure(spec) == StageFailure(kind="user", message=message)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("crash", "RuntimeError: the floor gave way"),
        ("out_of_memory", "OutOfMemoryError: tried to allocate 80 GiB"),
    ],
)
def test_run_stage_with_a_crash_prints_its_traceback_and_removes_an_old_manifest(tmp_path, ending, message):
    spec = SleepySpec(folder=tmp_path, ending=ending)
    manifest_path(spec).write_text("of an earlier run")
    stage = start_stage(spec)
    _, err = stage.communicate(timeout=60)
    assert stage.returncode == EXIT_FAILED
    assert "Traceback" in err
    assert message in err
    assert read_failure(spec).kind == ending
    assert read_failure(spec).message == message
    assert "in main" in read_failure(spec).traceback
    assert not manifest_path(spec).exists()


def test_run_stage_with_an_unknown_spec_key_fails_with_the_key(tmp_path):
    (tmp_path / "spec.json").write_text(json.dumps({"folder": str(tmp_path), "stepps": 3}))
    stage = subprocess.run([*STAGE, str(tmp_path / "spec.json")], cwd=REPOSITORY, timeout=60)
    assert stage.returncode == EXIT_FAILED
    assert "stepps" in (tmp_path / "manifest.error.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_during_a_save_do_not_interrupt_it(tmp_path, number):
    spec = SleepySpec(folder=tmp_path, steps=10_000, save_seconds=1.0)
    stage = start_stage(spec)
    wait_for_number(tmp_path / "stage-0.pid")
    stage.send_signal(number)
    reached = wait_for_number(tmp_path / "saving")
    for another in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        stage.send_signal(another)
    stage.communicate(timeout=60)
    assert stage.returncode == EXIT_STOPPED
    assert wait_for_number(tmp_path / "saved", seconds=0) == reached
    assert not manifest_path(spec).exists()
    assert not error_path(manifest_path(spec)).exists()


def test_second_stage_on_the_same_manifest_waits_for_the_first(tmp_path):
    first = start_stage(SleepySpec(folder=tmp_path, steps=10_000, save_seconds=1.0))
    wait_for_number(tmp_path / "stage-0.pid")
    second = start_stage(SleepySpec(folder=tmp_path))
    assert second.stdout is not None
    assert "Waiting for another process" in second.stdout.readline()
    first.terminate()
    second.communicate(timeout=60)
    assert second.returncode == EXIT_DONE
    assert first.wait(timeout=60) == EXIT_STOPPED
    assert (tmp_path / "saved").exists(), "the second ran before the first had saved"
    assert json.loads(manifest_path(SleepySpec(folder=tmp_path)).read_text())["steps"] == 5


def test_waiting_stage_stops_on_sigterm(tmp_path):
    first = start_stage(SleepySpec(folder=tmp_path, steps=10_000))
    wait_for_number(tmp_path / "stage-0.pid")
    second = start_stage(SleepySpec(folder=tmp_path))
    assert "Waiting for another process" in second.stdout.readline()
    second.terminate()
    second.communicate(timeout=60)
    first.terminate()
    first.communicate(timeout=60)
    assert second.returncode == EXIT_STOPPED
    assert (tmp_path / "starts").read_text() == "x", "the second did work"


def test_stage_of_a_dead_launcher_exits_before_working(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    stage = start_stage(SleepySpec(folder=tmp_path), **{PARENT_PID_VARIABLE: str(dead.pid)})
    stage.communicate(timeout=60)
    assert stage.returncode == EXIT_STOPPED
    assert not (tmp_path / "starts").exists()


def test_launched_stage_kills_its_remaining_helpers(tmp_path):
    stage = start_stage(SleepySpec(folder=tmp_path, helper=True), **{PARENT_PID_VARIABLE: str(os.getpid())})
    stage.wait(timeout=60)
    assert stage.returncode == EXIT_DONE
    helper = wait_for_number(tmp_path / "helper-0.pid", seconds=0)
    wait_for(lambda: not runs(helper), 5, "helper gone")
    stage.communicate()


def test_stage_on_rank_1_is_silent_and_writes_no_manifest(tmp_path):
    spec = SleepySpec(folder=tmp_path)
    stage = start_stage(spec, RANK="1")
    out, _ = stage.communicate(timeout=60)
    assert stage.returncode == EXIT_DONE
    assert (tmp_path / "done-1").exists()
    assert not manifest_path(spec).exists()
    assert "count" not in out


def test_stage_exits_without_waiting_for_the_resource_tracker(tmp_path):
    (tmp_path / "tracked_stage.py").write_text(
        textwrap.dedent("""
            import time
            from multiprocessing import resource_tracker
            from pydantic import BaseModel
            from sdxl_pipeline.runtime.stage_runner import run_stage

            class Nothing(BaseModel):
                pass

            class Done(BaseModel):
                at: float

            def main(spec, reporter, stop):
                resource_tracker.ensure_running()
                return Done(at=time.time())

            run_stage(Nothing, main)
        """)
    )
    (tmp_path / "spec.json").write_text("{}")
    command = [sys.executable, str(tmp_path / "tracked_stage.py"), str(tmp_path / "spec.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), PARENT_PID_VARIABLE: str(os.getpid())}
    subprocess.run(command, check=True, env=environment, timeout=60)
    assert time.time() - json.loads((tmp_path / "manifest.json").read_text())["at"] < 4


def test_run_stage_sets_cpu_threads_of_the_hardware(tmp_path):
    (tmp_path / "threads_stage.py").write_text(
        textwrap.dedent("""
            from pydantic import BaseModel
            from sdxl_pipeline.config.hardware_profiles import Hardware
            from sdxl_pipeline.runtime.stage_runner import run_stage

            class Spec(BaseModel):
                hardware: Hardware

            class Manifest(BaseModel):
                threads: int

            def main(spec, reporter, stop):
                import torch
                return Manifest(threads=torch.get_num_threads())

            run_stage(Spec, main)
        """)
    )
    from sdxl_pipeline.config.hardware_profiles import PRESETS

    hardware = PRESETS["cpu"].model_dump() | {"cpu_threads": 3}
    (tmp_path / "spec.json").write_text(json.dumps({"hardware": hardware}))
    command = [sys.executable, str(tmp_path / "threads_stage.py"), str(tmp_path / "spec.json")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=120)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"threads": 3}


def test_stage_runner_imports_neither_torch_nor_rich():
    code = (
        "import sys, sdxl_pipeline.runtime.stage_runner; print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.split() == ["False", "False"]


def test_stop_signal_raises_only_once_requested():
    stop = StopSignal()
    stop.raise_if_requested()
    stop.request()
    assert stop.requested
    with pytest.raises(StageStopped):
        stop.raise_if_requested()
