"""Which settings hold paths. Whatever completes them, or keeps them on this machine, asks here."""

from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.schema.checkpoints import LATEST
from sdxl_pipeline.config.schema.key_facts import key_of, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings

PLACES: Final = keys_with(TrainingSettings, lambda key: key.path == "local")
"""Keys of paths of this machine, such as the output folder."""

SOURCES: Final = keys_with(TrainingSettings, lambda key: key.path not in (None, "local"))
"""Keys that name a model, a checkpoint or a file by a name or a local path. Of a path only the last part means something elsewhere."""


def with_absolute_paths(settings: TrainingSettings, folder: Path) -> TrainingSettings:
    """The settings with paths seen from `folder`. A source stays a name where no such file or folder is there."""
    changes = {key: _completed(key, getattr(settings, key), folder) for key in (*PLACES, *SOURCES)}
    completed = settings.model_copy(update=changes)
    # What was written stays apart from what is filled in, so that every value's source can be told.
    completed.model_fields_set.intersection_update(settings.model_fields_set)
    return completed


def inside(folder: Path, written: str | Path) -> Path:
    """Return a written path as an absolute one; a relative one is relative to `folder`."""
    path = folder / Path(written).expanduser()
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links that lead in a circle, or through a folder that may not be read
        return path.absolute()


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; False where that may not be seen."""
    try:
        return path.exists()
    except OSError:
        return False


def _completed(key: str, value: Any, folder: Path) -> Any:
    kind = key_of(TrainingSettings.model_fields[key]).path
    if not isinstance(value, str) or kind == "base model" or value == LATEST:
        return value  # `resolve_base_model` searches for the base model from the project's folder
    path = inside(folder, value)
    return str(path) if kind != "name or path" or exists(path) else value
