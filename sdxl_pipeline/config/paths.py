"""Local paths of the settings: completed from the project's folder, and the paths of an initial adapter and of a checkpoint to resume."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE, LATEST
from sdxl_pipeline.config.schema.key_facts import key_of, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

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


SUFFIX = ".safetensors"
_WEIGHTS = (SUFFIX, ".ckpt", ".pt", ".pth", ".bin")


class HubFile(NamedTuple):
    """A file of a Hub repository; `file` is None for its only weights file, or the one with the default name."""

    repo_id: str
    file: str | None


def parse_hub_file(written: str) -> HubFile | None:
    """Parse `owner/name` or `owner/name/file.safetensors`; return None for text that can only be a local path."""
    parts = written.split("/")
    is_path = Path(written).is_absolute() or written.startswith((".", "~")) or "\\" in written
    if (
        is_path
        or not all(parts)
        or len(parts) < 2
        or (len(parts) == 2 and Path(written).suffix.lower() in _WEIGHTS)
    ):
        return None
    return HubFile("/".join(parts[:2]), "/".join(parts[2:]) or None)


def check_init_lora(written: str | None, folder: Path) -> Iterator[Finding]:
    """Yield what is wrong with the value, relative to the project's folder. Whether the Hub has the file is checked at the start of a run."""
    if written is None:
        return
    path = resolve_path(folder, written)
    hint = f"name a {SUFFIX} file, or write owner/name or owner/name/file{SUFFIX} for a file of the Hub"
    on_hub = None if exists(path) else parse_hub_file(written)
    name = path.name if on_hub is None else on_hub.file
    if exists(path) and path.is_dir():
        yield Finding("init_lora", "is a folder", hint)
    elif name is not None and Path(name).suffix.lower() != SUFFIX:
        yield Finding(
            "init_lora", f"is not a {SUFFIX} file; other formats may execute code when they are loaded", hint
        )
    elif on_hub is None and not exists(path):
        yield Finding("init_lora", "does not exist", hint)


NOT_A_CHECKPOINT = "which is not a checkpoint"
CHECKPOINT_HINT = (
    "write the path of a folder such as <output_dir>/lora/<run>/checkpoints/step-00000500, "
    'or "latest", or "none"'
)


def checkpoint_path_of(written: str | None, folder: Path) -> Path | None:
    """Return the path, relative to the project's folder; None for "latest" and for None (start at step 0)."""
    return None if written in (None, LATEST) else folder / Path(written or "").expanduser()


def is_checkpoint(path: Path) -> bool:
    """Return whether the folder contains a checkpoint, complete or not."""
    return exists(path / CHECKPOINT_STATE)


def check_resume_from(written: str | None, folder: Path) -> Iterator[Finding]:
    """Yield a finding if there is no checkpoint at the path. Its content is checked at the start of a run."""
    path = checkpoint_path_of(written, folder)
    if path is not None and not is_checkpoint(path):
        yield Finding("resume_from_checkpoint", f"names {path}, {NOT_A_CHECKPOINT}", CHECKPOINT_HINT)
