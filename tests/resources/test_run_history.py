"""The run history: any number of first starts at once make one that works, and damage is reported with the file and what to do."""

import multiprocessing
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import dagster as dg
import pytest

from resources.run_history import DamagedHistoryError, RunHistoryStorage
from tests.resources.worker import REPOSITORY

FILES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
STARTS = 6


def create(folder: Path, barrier: Barrier) -> None:
    barrier.wait()
    storage = RunHistoryStorage.from_local(str(folder))
    storage.run_storage.get_runs()


def test_first_starts_at_the_same_time_all_succeed(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("damage", [overwrite_header, overwrite_pages])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_advice_works(tmp_path: Path, name: str, damage) -> None:
    RunHistoryStorage.from_local(str(tmp_path))
    path = tmp_path / name
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()
    damage(path)
    with pytest.raises(
        DamagedHistoryError, match="weights, caches and datasets are stored elsewhere"
    ) as error:
        read_everything(RunHistoryStorage.from_local(str(tmp_path)))
    assert f"{path} (" in str(error.value)
    for found in path.parent.glob(f"{path.name}*"):
        found.rename(tmp_path / found.name)
    read_everything(RunHistoryStorage.from_local(str(tmp_path)))


def read_everything(storage: RunHistoryStorage) -> None:
    storage.run_storage.get_runs()
    storage.event_log_storage.get_pool_limits()
    storage.schedule_storage.all_instigator_state()


def test_two_heads_of_an_interrupted_first_start_are_reported_as_damage(tmp_path: Path) -> None:
    import sqlite3

    RunHistoryStorage.from_local(str(tmp_path))
    with sqlite3.connect(tmp_path / "history" / "runs.db") as connection:
        connection.execute("INSERT INTO alembic_version VALUES ('16e3115a602a')")
    with pytest.raises(DamagedHistoryError, match=str(tmp_path)):
        RunHistoryStorage.from_local(str(tmp_path))


def test_dagsters_command_prints_the_sentence_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = (REPOSITORY / "dagster.yaml").read_text()
    (tmp_path / "dagster.yaml").write_text(shipped.replace(".dagster", str(tmp_path / "dagster")))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.DagsterInstance.get():
        pass
    overwrite_header(tmp_path / "dagster" / "history" / "runs.db")
    command = [sys.executable, "-m", "dagster", "run", "list"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: The run history is damaged: ")
    assert "Traceback" not in run.stderr
