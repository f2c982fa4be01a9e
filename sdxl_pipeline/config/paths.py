"""Settings that contain paths, and their resolution relative to a project's folder."""

from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.schema.checkpoints import LATEST
from sdxl_pipeline.config.schema.key_facts import key_of, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings

LOCAL_PATH_KEYS: Final = keys_with(TrainingSettings, lambda key: key.path == "local")
"""Keys of paths of this machine, such as the output folder."""

NAME_OR_PATH_KEYS: Final = keys_with(TrainingSettings, lambda key: key.path not in (None, "local"))
"""Keys that name a model, a checkpoint or a file by a name or a local path. Of a path only the last part means something elsewhere."""


def with_absolute_paths(settings: TrainingSettings, folder: Path) -> TrainingSettings:
    """Return the settings with absolute paths; relative ones are relative to `folder`. A name without such a file or folder is unchanged."""
    changes = {
        key: _resolve_value(key, getattr(settings, key), folder)
        for key in (*LOCAL_PATH_KEYS, *NAME_OR_PATH_KEYS)
    }
    completed = settings.model_copy(update=changes)
    # model_fields_set contains written keys only, from which the source of every value is derived
    completed.model_fields_set.intersection_update(settings.model_fields_set)
    return completed


def resolve_path(folder: Path, written: str | Path) -> Path:
    """Return a written path as an absolute one; a relative one is relative to `folder`."""
    path = folder / Path(written).expanduser()
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # circular links, or a folder without read permission
        return path.absolute()


def exists(path: Path) -> bool:
    """Return whether the file or folder exists; False if there is no permission to check."""
    try:
        return path.exists()
    except OSError:
        return False


def _resolve_value(key: str, value: Any, folder: Path) -> Any:
    kind = key_of(TrainingSettings.model_fields[key]).path
    if not isinstance(value, str) or kind == "base model" or value == LATEST:
        return value  # `resolve_base_model` searches for the base model from the project's folder
    path = resolve_path(folder, value)
    return str(path) if kind != "name or path" or exists(path) else value
