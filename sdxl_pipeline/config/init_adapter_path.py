"""Validation of `init_lora`: a local file, or a file of a Hub repository."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sdxl_pipeline.config.paths import exists, resolve_path
from sdxl_pipeline.config.validators.dataset_rules import Finding

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
