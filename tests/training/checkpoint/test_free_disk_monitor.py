"""Disk space of a run: nothing is written that would not fit, and low space stops or pauses the run."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.checkpoint import free_disk_monitor
from sdxl_pipeline.training.checkpoint.free_disk_monitor import FreeDiskMonitor
from tests.support.small_disk import run_on_small_disk

Usage = namedtuple("Usage", "total used free")

PROGRAM = """
import sys
from pathlib import Path

from sdxl_pipeline.runtime.stage_runner import UserError, StopSignal
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.files.disk_space import DiskFullError
from sdxl_pipeline.stages.train import main
from tests.support.small_disk import enlarge_disk, mount_small_disk
from tests.support.training_datasets import make_spec

folder, run = Path(sys.argv[1]), Path(sys.argv[1]) / "run"
run.mkdir()
mount_small_disk(run, "12m")

settings = dict(max_train_steps=12, checkpoint_step_interval=1, lora_rank=8)
def train(**more):
    return main(make_spec(folder, **settings, **more), Reporter(), StopSignal())

try:
    train()
except DiskFullError as error:
    print("full:", error)
else:
    sys.exit("no error")
retained = sorted(path.name for path in (run / "checkpoints").iterdir())
assert retained and all(name.startswith("step-") for name in retained), retained
print("retained:", len(retained))

enlarge_disk(run, "16m")
try:
    train(disk_low_threshold="12M")
except UserError as error:
    print("low:", error)
else:
    sys.exit("no error")

enlarge_disk(run, "64m")
done = train(disk_low_threshold="12M")
assert done.resumed_from_step == len(retained), (done.resumed_from_step, retained)
print("done:", done.steps)
"""


@pytest.mark.slow
def test_train_on_a_small_disk_raises_before_filling_it_and_resumes(tmp_path: Path):
    full, retained, low, done = run_on_small_disk(PROGRAM, tmp_path).splitlines()
    step = int(retained.removeprefix("retained: "))
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
def test_disk_low_threshold_units_are_powers_of_1024(written, read):
    assert TrainingSettings(disk_low_threshold=written).disk_low_threshold == read


def test_disk_low_threshold_invalid_size_raises():
    with pytest.raises(ValueError, match="is not a size") as refused:
        TrainingSettings(disk_low_threshold="plenty")
    assert isinstance(refused.value.errors()[0]["ctx"]["error"], BadValueError)


def test_must_stop_with_wait_blocks_until_there_is_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    free = [5, 5, 5, 5, 50]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 0, free.pop(0) if free else 50))
    monkeypatch.setattr(free_disk_monitor, "WAIT_INTERVAL_SECONDS", 0.0)
    reported: list[str] = []
    monitor = FreeDiskMonitor(tmp_path, TrainingSettings(disk_low_threshold=10, disk_low_action="wait"))
    assert not monitor.must_stop(StopSignal(), reported.append)
    assert len(reported) == 1
    assert "disk_low_threshold (10 bytes). Waiting" in reported[0]
    assert not free


def test_must_stop_with_wait_returns_on_a_stop_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    stop = StopSignal()
    stop.request()
    monitor = FreeDiskMonitor(tmp_path, TrainingSettings(disk_low_threshold=10, disk_low_action="wait"))
    assert not monitor.must_stop(stop, lambda line: None)


def test_must_stop_without_threshold_does_not_query_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delattr(shutil, "disk_usage")
    assert not FreeDiskMonitor(tmp_path, TrainingSettings()).must_stop(StopSignal(), print)
