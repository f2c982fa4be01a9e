"""The run history: concurrent first starts create a valid one, and corruption is reported with the file and the fix."""

import multiprocessing
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import dagster as dg
import pytest

from resources.run_history import CorruptHistoryError, RunHistoryStorage
from tests.resources.worker import REPOSITORY

FILES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
STARTS = 6


def create(folder: Path, barrier: Barrier) -> None:
    barrier.wait()
    storage = RunHistoryStorage.from_local(str(folder))
    storage.run_storage.get_runs()


@pytest.mark.slow
def test_storage_concurrent_first_starts_all_succeed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        barrier = context.Barrier(STARTS)
        processes = [
            context.Process(target=create, args=(tmp_path / str(attempt), barrier)) for _ in range(STARTS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * STARTS
        RunHistoryStorage.from_local(str(tmp_path / str(attempt)))


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"not a database" + path.read_bytes()[14:])


def overwrite_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 40] = bytes([0x5A]) * 40
    path.write_bytes(content)


@pytest.mark.parametrize("corrupt", [overwrite_header, overwrite_pages])
@pytest.mark.parametrize("name", FILES)
def test_storage_corrupt_file_is_named_and_moving_it_away_fixes_it(
    tmp_path: Path, name: str, corrupt
) -> None:
    RunHistoryStorage.from_local(str(tmp_path))
    path = tmp_path / name
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()
    corrupt(path)
    with pytest.raises(
        CorruptHistoryError, match="weights, caches and datasets are stored elsewhere"
    ) as error:
        read_all_storages(RunHistoryStorage.from_local(str(tmp_path)))
    assert f"{path} (" in str(error.value)
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(tmp_path / file.name)
    read_all_storages(RunHistoryStorage.from_local(str(tmp_path)))


def read_all_storages(storage: RunHistoryStorage) -> None:
    storage.run_storage.get_runs()
    storage.event_log_storage.get_pool_limits()
    storage.schedule_storage.all_instigator_state()


def test_storage_two_alembic_heads_are_reported_as_corruption(tmp_path: Path) -> None:
    import sqlite3

    RunHistoryStorage.from_local(str(tmp_path))
    with sqlite3.connect(tmp_path / "history" / "runs.db") as connection:
        connection.execute("INSERT INTO alembic_version VALUES ('16e3115a602a')")
    with pytest.raises(CorruptHistoryError, match=str(tmp_path)):
        RunHistoryStorage.from_local(str(tmp_path))


def test_dagster_command_corrupt_history_prints_only_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = (REPOSITORY / "dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(configuration.replace(".dagster", str(tmp_path / "dagster")))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.DagsterInstance.get():
        pass
    overwrite_header(tmp_path / "dagster" / "history" / "runs.db")
    command = [sys.executable, "-m", "dagster", "run", "list"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: The run history is corrupt: ")
    assert "Traceback" not in run.stderr
