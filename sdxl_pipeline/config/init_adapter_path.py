"""What `init_lora` names: a local file, or one of a repository of the Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sdxl_pipeline.config.paths import exists, inside
from sdxl_pipeline.config.validators.dataset_rules import Finding

SUFFIX = ".safetensors"
_WEIGHTS = (SUFFIX, ".ckpt", ".pt", ".pth", ".bin")


class HubFile(NamedTuple):
    """A file of a repository; None for the only one, or the one of the usual name."""

    repo_id: str
    file: str | None


def hub_file(written: str) -> HubFile | None:
    """`owner/name` or `owner/name/file.safetensors` taken apart; None for what can only be a local path."""
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
    """What is wrong with the name, seen from the project's folder; whether the Hub has such a file is seen at the launch of a run."""
    if written is None:
        return
    path = inside(folder, written)
    hint = f"name a {SUFFIX} file, or write owner/name or owner/name/file{SUFFIX} for one of the Hub"
    on_hub = None if exists(path) else hub_file(written)
    name = path.name if on_hub is None else on_hub.file
    if exists(path) and path.is_dir():
        yield Finding("init_lora", "is a folder", hint)
    elif name is not None and Path(name).suffix.lower() != SUFFIX:
        yield Finding("init_lora", f"is no {SUFFIX} file; others may run code when they are opened", hint)
    elif on_hub is None and not exists(path):
        yield Finding("init_lora", "does not exist", hint)
