"""Which settings hold paths. Whatever completes them, or keeps them on this machine, asks here."""

from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.config.schema.checkpoints import LATEST
from sdxl_pipeline.config.schema.training import TrainingSettings

PLACES: Final = ("data_backend_config", "output_dir", "logging_dir", "user_prompt_library", "webhook_config")
"""Settings that say where something lies on this machine. They are no part of what made the weights."""

FOUND_WITH_THE_MODEL: Final = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path")
"""Sources that stay as they are written: `resolve_base_model` looks for them from the project's folder, and records what it found."""

SOURCES: Final = (
    *FOUND_WITH_THE_MODEL,
    "pretrained_evaluation_model_name_or_path",
    "validation_preview_model_name_or_path",
    "init_lora",
    "resume_from_checkpoint",
    "lycoris_config",
)
"""Settings that name a model, a checkpoint or a file of settings: by a name, or by a local path, of which only the last part means
something elsewhere."""


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
    if not isinstance(value, str) or key in FOUND_WITH_THE_MODEL or value == LATEST:
        return value
    path = inside(folder, value)
    is_path = key in (*PLACES, "resume_from_checkpoint") or exists(path)
    return str(path) if is_path else value
