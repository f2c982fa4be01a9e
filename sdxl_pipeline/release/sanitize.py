"""What of a run may leave this machine: settings and lineage without local paths, and a guard against what should have stayed."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdxl_pipeline.config.paths import SOURCES
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings

LOCAL_KEYS = frozenset(keys_with(TrainingSettings, lambda key: not key.is_published))
"""Settings that say where things lie on this machine, or when it works; they are no part of what made the weights."""

TEXT_SUFFIXES = frozenset({".md", ".json", ".txt"})


class ReleaseError(Exception):
    """A release that must not be published as it is; the message says why."""


def portable_settings(settings: TrainingSettings) -> dict[str, Any]:
    """The effective settings as plain data that means something on another machine."""
    kept = settings.model_dump(mode="json", exclude=set(LOCAL_KEYS))
    return kept | {key: portable_name(kept[key]) for key in SOURCES if isinstance(kept[key], str)}


def portable_lineage(value: Any) -> Any:
    """Plain data with every string that is a local path cut down to its last name."""
    if isinstance(value, Mapping):
        return {key: portable_lineage(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable_lineage(item) for item in value]
    return portable_name(value) if isinstance(value, str) else value


def portable_name(source: str) -> str:
    """A Hub id or a bundled model's name as it is; of a local path the last name."""
    windows = PureWindowsPath(source)
    if windows.is_absolute():
        return windows.name
    written_as_path = source.startswith(("/", "~", "./", "../")) or source in (".", "..")
    if written_as_path or source.lower().endswith(".safetensors"):
        return PurePosixPath(source).name or "local model"
    return source


def require_portable(folder: Path, secrets: Iterable[str], places: Iterable[Path]) -> None:
    """Raise ReleaseError when a text file under `folder` holds one of the secrets, or the path of one of the places.

    The last door: what is published was made from settings and lineage that users and later code fill, and a token cannot be unpublished.
    """
    names = {str(place) for place in places if len(place.parts) > 2}
    hidden = {secret for secret in secrets if secret}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in TEXT_SUFFIXES:
            continue
        text = path.read_text(encoding="utf-8")
        if any(secret in text for secret in hidden):
            raise ReleaseError(
                f"{path.name} of the release holds the Hub token. Take it out of the project's settings and prompts"
            )
        if found := next((name for name in names if name in text), None):
            raise ReleaseError(
                f"{path.name} of the release holds the local path {found}. Take it out of the project's settings and prompts"
            )
