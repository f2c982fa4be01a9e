"""A full disk gives one error message, wherever it is detected: the disk, and the needed, reserved and free bytes."""

import errno
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from sdxl_pipeline.files.disk_space import (
    DiskFullError,
    describe_disk_full,
    disk_full_message,
    format_size,
    is_disk_full,
    require_space,
)
from tests.support.small_disk import run_on_small_disk

Usage = namedtuple("Usage", "total used free")


def test_size_text_chooses_the_unit():
    assert [format_size(count) for count in (12, 2048, 5 << 20, 3 << 29, 5 << 40)] == [
        "12 bytes",
        "2.0 KiB",
        "5.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


def test_require_space_within_the_reserve_raises_with_all_sizes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 << 19))
    with pytest.raises(DiskFullError) as raised:
        require_space(tmp_path / "not" / "yet", 780 << 10, "the final weights", "Free some.")
    assert str(raised.value) == (
        f"no space left on the disk of {tmp_path}/not/yet for the final weights: 780.0 KiB are needed, 1.0 MiB are kept in reserve, "
        "and 1.5 MiB are free. Free some."
    )
    require_space(tmp_path, 512 << 10, "the final weights")


def chained(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except type(cause) as error:
            raise ValueError("cannot save") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (chained(OSError(errno.ENOSPC, "No space left on device")), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("space"), False),
    ],
)
def test_is_disk_full_detects_library_errors(error, full):
    assert is_disk_full(error) == full


def test_describe_disk_full_uses_the_path_of_the_error(tmp_path: Path):
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"), None, str(tmp_path / "b"))
    assert f"the disk of {tmp_path / 'b'} for the scan: an unknown size is needed" in describe_disk_full(
        error, tmp_path, "the scan"
    )
    own = DiskFullError(disk_full_message(tmp_path, "the scan"))
    assert describe_disk_full(own, tmp_path, "x") == str(own) == str(pickle.loads(pickle.dumps(own)))
    assert own.errno == errno.ENOSPC


DATASET_STEP = """
import json, sys
from pathlib import Path

import dagster as dg
from PIL import Image

from sdxl_pipeline.definitions import build_definitions
from tests.conftest import CONFIG, DATASET
from tests.support.small_disk import enlarge_disk, mount_small_disk

here = Path(sys.argv[1])
storage, project = here / "storage", here / "projects" / "full"
storage.mkdir()
mount_small_disk(storage, "32k")
(project / "data").mkdir(parents=True)
for number in range(4):
    Image.effect_noise((128, 128), 10 + number).save(project / "data" / f"{number}.png")
    (project / "data" / f"{number}.txt").write_text(f"noise {number}")
(project / "config.json").write_text(json.dumps(CONFIG))
(project / "multidatabackend.json").write_text(json.dumps([DATASET]))
with open(storage / "ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(4096))
    except OSError:
        pass
definitions = build_definitions(project.parent)
key = dg.AssetKey(["full", "shapes_dataset"])

def run():
    with dg.DagsterInstance.ephemeral() as instance:
        return dg.materialize(
            list(definitions.assets), selection=dg.AssetSelection.assets(key), resources=dict(definitions.resources),
            instance=instance, raise_on_error=False,
        )

done = run()
assert not done.success
(failure,) = [event for event in done.all_events if event.is_step_failure]
print(failure.step_failure_data.user_failure_data.description)
(storage / "ballast").unlink()
enlarge_disk(storage, "4m")
assert run().success
"""


@pytest.mark.slow
def test_dataset_step_on_a_full_disk_fails_and_succeeds_with_free_space(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SDXL_PIPELINE_STORAGE", str(tmp_path / "storage"))
    message = run_on_small_disk(DATASET_STEP, tmp_path)
    assert message.startswith(f"no space left on the disk of {tmp_path / 'storage'}"), message
    assert "nothing is kept in reserve, and 0 bytes are free" in message
