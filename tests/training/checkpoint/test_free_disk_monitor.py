"""Holds what a run does about its disk: nothing is written that would not fit, and a disk that runs low stops or holds the run."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.checkpoint import free_disk_monitor
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor

Usage = namedtuple("Usage", "total used free")

PROGRAM = """
import ctypes, os, sys
from pathlib import Path

from sdxl_pipeline.runtime.stage_runner import UserError, StopSignal
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.stages.train import main
from tests.support.training_datasets import make_spec

here, run = Path(sys.argv[1]), Path(sys.argv[1]) / "run"
run.mkdir()
# In a mount namespace of this process's own, which ends with it.
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC_PRIVATE, MS_REMOUNT = 0x20000, (1 << 14) | (1 << 18), 1 << 5
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None) or libc.mount(
    b"tmpfs", str(run).encode(), b"tmpfs", 0, b"size=12m"
):
    print("cannot mount:", os.strerror(ctypes.get_errno()))
    sys.exit(77)

settings = dict(max_train_steps=12, checkpoint_step_interval=1, lora_rank=8)
def train(**more):
    return main(make_spec(here, **settings, **more), Reporter(), StopSignal())

try:
    train()
except DiskFullError as error:
    print("full:", error)
else:
    sys.exit("no error")
kept = sorted(place.name for place in (run / "checkpoints").iterdir())
assert kept and all(name.startswith("step-") for name in kept), kept
print("kept:", len(kept))

libc.mount(b"tmpfs", str(run).encode(), b"tmpfs", MS_REMOUNT, b"size=16m")
try:
    train(disk_low_threshold="12M")
except UserError as error:
    print("low:", error)
else:
    sys.exit("no error")

libc.mount(b"tmpfs", str(run).encode(), b"tmpfs", MS_REMOUNT, b"size=64m")
done = train(disk_low_threshold="12M")
assert done.resumed_from_step == len(kept), (done.resumed_from_step, kept)
print("done:", done.steps)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_small_disk_ends_the_run_before_a_write_that_would_fill_it_and_the_next_run_goes_on(tmp_path: Path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    if os.geteuid() != 0:
        command = ["unshare", "--map-root-user", "--mount", *command]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("neither root nor `unshare` to mount a tmpfs with")
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {run.stdout}{run.stderr}")
    assert run.returncode == 0, run.stderr
    full, kept, low, done = run.stdout.splitlines()
    step = int(kept.removeprefix("kept: "))
    assert f"no space left on the disk of {tmp_path / 'run' / 'checkpoints'}" in full
    assert f"for the checkpoint of step {step + 1}: " in full
    assert "1.0 MiB are kept in reserve" in full
    assert "checkpoints_total_limit" in full
    assert "below disk_low_threshold (12.0 MiB)" in low
    assert f"Step {step} is saved" in low
    assert done == "done: 12"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("100G", 100 << 30),
        ("100GB", 100 << 30),
        ("1.5 TiB", 3 << 39),
        ("500k", 500 << 10),
        ("4096", 4096),
        (7, 7),
        ("0", None),
        (None, None),
    ],
)
def test_sizes_are_read_in_powers_of_1024(written, read):
    assert TrainingSettings(disk_low_threshold=written).disk_low_threshold == read


def test_a_threshold_that_is_no_size_is_refused():
    with pytest.raises(ValueError, match="is not a size") as refused:
        TrainingSettings(disk_low_threshold="plenty")
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], BadValueError)


def test_a_run_may_wait_for_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    free = [5, 5, 5, 5, 50]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100, 0, free.pop(0) if free else 50))
    monkeypatch.setattr(free_disk_monitor, "WAIT_INTERVAL_SECONDS", 0.0)
    said: list[str] = []
    watch = FreeDiskMonitor(tmp_path, TrainingSettings(disk_low_threshold=10, disk_low_action="wait"))
    assert not watch.must_stop(StopSignal(), said.append)
    assert len(said) == 1
    assert "disk_low_threshold (10 bytes). Waiting" in said[0]
    assert not free


def test_a_run_that_waits_for_space_can_be_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100, 100, 0))
    stop = StopSignal()
    stop.request()
    watch = FreeDiskMonitor(tmp_path, TrainingSettings(disk_low_threshold=10, disk_low_action="wait"))
    assert not watch.must_stop(stop, lambda line: None)


def test_without_a_threshold_nobody_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delattr(shutil, "disk_usage")
    assert not FreeDiskMonitor(tmp_path, TrainingSettings()).must_stop(StopSignal(), print)
