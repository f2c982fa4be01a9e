"""The file that `init_lora` names: where it lies, and what it holds as a digest. No torch."""

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Final

from sdxl_pipeline.config.init_adapter_path import hub_file
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter_files import AdapterError, read_header
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.models.model_files import BaseModelError

USUAL_NAME: Final = "pytorch_lora_weights.safetensors"


def find_initial_adapter(written: str, folder: Path) -> Path:
    """The file that `init_lora` names: a local one, seen from `folder`, or one of a repository of the Hub, which is downloaded into this machine's cache.

    Of a repository named without a file, it is pytorch_lora_weights.safetensors, or the only .safetensors there. Raises AdapterError.
    """
    local = folder / Path(written).expanduser()
    if local.is_file():
        return local.resolve()
    place = hub_file(written)
    if place is None:
        raise AdapterError(f"init_lora: {written} does not exist.")
    repo_id, usual = place.repo_id, place.file or USUAL_NAME
    chosen: list[str] = []

    def choose(listing: Collection[str]) -> list[str]:
        held = [other for other in listing if PurePosixPath(other).suffix.lower() == ".safetensors"]
        chosen[:] = [usual] if usual in held else held
        if usual not in held and (place.file or len(held) != 1):
            listed = ", ".join(sorted(held)) or "none"
            raise AdapterError(
                f"init_lora: {repo_id} has no {usual}. Its .safetensors files: {listed}. Write one of them as {repo_id}/FILE."
            )
        return chosen

    try:
        snapshot = download_snapshot(repo_id, None, [".gitattributes", "README.md", usual], choose)
    except BaseModelError as error:
        raise AdapterError(f"init_lora: {error}") from error
    return snapshot.folder / chosen[0]


def with_initial_adapter(settings: TrainingSettings, folder: Path) -> TrainingSettings:
    """The settings with the place of the file in `init_lora`, where they name one. Raises AdapterError."""
    if settings.init_lora is None:
        return settings
    place = str(find_initial_adapter(settings.init_lora, folder))
    return settings.model_copy(update={"init_lora": place})


def initial_adapter_digest(path: str | None) -> str | None:
    """Hex SHA-256 of the file, None for none. Raises AdapterError for one that is absent or no safetensors."""
    if path is None:
        return None
    read_header(Path(path))
    return sha256_file(Path(path))
