"""The run history of a Dagster instance in SQLite files: created by one process at a time; errors name a corrupt file."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from alembic.util import CommandError
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData
from filelock import lock_descriptor
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_folders: set[Path] = set()


class CorruptHistoryError(click.ClickException):
    """A corrupt file of the run history. Dagster's commands are click commands and print only its message."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"The run history is corrupt: {path} ({reason}). Move this file away, with those of the same name that end in -wal and -shm, "
            "and run this again. The history in it (runs and events in the UI) is lost; weights, caches and datasets are stored elsewhere "
            "and are reused."
        )


class RunHistoryStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage. `dagster.yaml` names it, so that every Dagster command goes through it."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        folder = Path(base_dir).resolve()
        _folders.add(folder)
        # Two processes that create the tables at the same time make the history unusable.
        with (folder / ".lock").open("a") as lock:
            lock_descriptor(lock.fileno())
            try:
                super().__init__(base_dir, inst_data)
            except CommandError as error:  # raised by Alembic
                raise CorruptHistoryError(folder, error) from error

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> "RunHistoryStorage":
        """Create the storage from its entry in `dagster.yaml`."""
        return cls.from_local(inst_data=inst_data, **config_value)


@event.listens_for(Engine, "handle_error")
def _report_corrupt_file(context: ExceptionContext) -> None:
    """Convert SQLite's error about a corrupt history file into a CorruptHistoryError, whichever query raises it."""
    error, engine = context.original_exception, context.engine
    if engine is None or getattr(error, "sqlite_errorcode", 0) & 0xFF not in CORRUPT:
        return
    path = Path(engine.url.database or "")
    if any(path.is_relative_to(folder) for folder in _folders):
        raise CorruptHistoryError(path, error) from error
