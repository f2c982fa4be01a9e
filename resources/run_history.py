"""The run history of a Dagster instance in SQLite files: created by one process at a time, and named when it is damaged."""

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

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_folders: set[Path] = set()


class DamagedHistoryError(click.ClickException):
    """A damaged file of the run history. Dagster's commands, which are click's, print its message alone."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"The run history is damaged: {path} ({reason}). Move this file away, with those of the same name that end in -wal and -shm, "
            "and run this again. The history in it (runs and events in the UI) is lost; weights, caches and datasets are stored elsewhere "
            "and are reused."
        )


class RunHistoryStorage(DagsterSqliteStorage):
    """Dagster's SQLite storage. `dagster.yaml` names it, so that every Dagster command goes through it."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        folder = Path(base_dir).resolve()
        _folders.add(folder)
        # Two processes that create the tables at the same time leave a history that none can open.
        with (folder / ".lock").open("a") as lock:
            lock_descriptor(lock.fileno())
            try:
                super().__init__(base_dir, inst_data)
            except CommandError as error:  # Alembic's own
                raise DamagedHistoryError(folder, error) from error

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> "RunHistoryStorage":
        """Create the storage from its entry in `dagster.yaml`."""
        return cls.from_local(inst_data=inst_data, **config_value)


@event.listens_for(Engine, "handle_error")
def _name_damaged_file(context: ExceptionContext) -> None:
    """Turn what SQLite reports about a damaged file of a history into a DamagedHistoryError, at whatever query it is noticed."""
    error, engine = context.original_exception, context.engine
    if engine is None or getattr(error, "sqlite_errorcode", 0) & 0xFF not in DAMAGED:
        return
    path = Path(engine.url.database or "")
    if any(path.is_relative_to(folder) for folder in _folders):
        raise DamagedHistoryError(path, error) from error
