"""The file of `init_lora`: its local path and its digest. No torch."""

from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Final

from sdxl_pipeline.config.paths import parse_hub_file
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter_files import AdapterError, read_header
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.models.model_files import BaseModelError

DEFAULT_ADAPTER_FILE: Final = "pytorch_lora_weights.safetensors"


def find_initial_adapter(setting: str, folder: Path) -> Path:
    """Return the local path of `init_lora`: a file relative to `folder`, or one of a Hub repository, downloaded into the Hub cache.

    For a repository without a file name, it is pytorch_lora_weights.safetensors, or the only .safetensors file. Raises AdapterError.
    """
    local = folder / Path(setting).expanduser()
    if local.is_file():
        return local.resolve()
    repo_file = parse_hub_file(setting)
    if repo_file is None:
        raise AdapterError(f"init_lora: {setting} does not exist.")
    repo_id, file_name = repo_file.repo_id, repo_file.file or DEFAULT_ADAPTER_FILE
    chosen: list[str] = []

    def choose(listing: Collection[str]) -> list[str]:
        safetensors_files = [
            other for other in listing if PurePosixPath(other).suffix.lower() == ".safetensors"
        ]
        chosen[:] = [file_name] if file_name in safetensors_files else safetensors_files
        if file_name not in safetensors_files and (repo_file.file or len(safetensors_files) != 1):
            listed = ", ".join(sorted(safetensors_files)) or "none"
            raise AdapterError(
                f"init_lora: {repo_id} has no {file_name}. Its .safetensors files: {listed}. Set init_lora to {repo_id}/FILE."
            )
        return chosen

    try:
        snapshot = download_snapshot(repo_id, None, [".gitattributes", "README.md", file_name], choose)
    except BaseModelError as error:
        raise AdapterError(f"init_lora: {error}") from error
    return snapshot.folder / chosen[0]


def resolve_init_lora(settings: TrainingSettings, folder: Path) -> TrainingSettings:
    """Return the settings with the local path of the `init_lora` file, if set. Raises AdapterError."""
    if settings.init_lora is None:
        return settings
    path = find_initial_adapter(settings.init_lora, folder)
    return settings.model_copy(update={"init_lora": str(path)})


def initial_adapter_digest(path: str | None) -> str | None:
    """Return the hex SHA-256 of the file, None for None. Raises AdapterError if it is missing or not a safetensors file."""
    if path is None:
        return None
    read_header(Path(path))
    return sha256_file(Path(path))
