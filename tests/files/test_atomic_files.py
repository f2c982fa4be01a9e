"""Atomic writes: a file is written completely or not at all; digests cover its bytes."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_pipeline.files.atomic_files import atomic_path, sha256_file, write_bytes_atomic, write_text_atomic


def test_write_atomic_creates_folders_and_keeps_bytes(tmp_path: Path):
    write_bytes_atomic(tmp_path / "a" / "b.bin", b"\x00\xff")
    write_text_atomic(tmp_path / "a" / "c.txt", "größe\r\n")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a" / "c.txt").read_bytes() == "größe\r\n".encode()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.bin", "c.txt"]


def test_atomic_path_on_failure_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "file.parquet"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".parquet"
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_without_a_write_raises(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "absent"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_of_a_killed_process_keeps_the_old_file(tmp_path: Path):
    target = tmp_path / "state.json"
    target.write_text("old")
    program = (
        "import sys, time; from pathlib import Path; from sdxl_pipeline.files.atomic_files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new, but only in part'); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        os.kill(child.pid, signal.SIGKILL)
    assert target.read_text() == "old"


def test_sha256_file_of_several_chunks(tmp_path: Path):
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "large").write_bytes(data)
    assert sha256_file(tmp_path / "large") == hashlib.sha256(data).hexdigest()
