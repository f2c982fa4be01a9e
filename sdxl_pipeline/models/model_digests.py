"""What a model is made of, as digests of content: where its files lie, and when they were written, plays no part.

Weights of many gigabytes are hashed once: their digests are kept in a small JSON file under a cache folder, with the size and the
modification time of the file they belong to.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import sha256_file, write_text_atomic
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.model_files import BaseModelError

# key prefixes of the components in a checkpoint of the original SDXL layout
SINGLE_FILE_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}

_CACHE_WORTH_BYTES = 1 << 20
_CHUNK = 1 << 20
# written by the saving library about itself; they change no number of the model
_CONFIG_NOTES = ("_name_or_path", "_diffusers_version", "transformers_version")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sdxl-pipeline`, by default ~/.cache/sdxl-pipeline."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-pipeline"


class DigestCache:
    """Digests of large files, remembered between processes in `<cache_dir>/file_digests.json`.

    An entry holds as long as the file's size and modification time do. Processes that write at once may lose each other's entries,
    which costs a second hashing and nothing else.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "file_digests.json"

    def file(self, path: Path) -> str:
        """SHA-256 of the whole file."""
        return self._remembered(path, "whole", lambda: sha256_file(path))

    def single_file_components(self, path: Path) -> dict[str, str]:
        """A digest per SDXL component of a single-file checkpoint; see `digest_tensors_by_prefix`."""
        found: dict[str, str] = self._remembered(
            path, "components", lambda: digest_tensors_by_prefix(path, SINGLE_FILE_PREFIXES)
        )
        return found

    def _remembered(self, path: Path, kind: str, compute: Callable[[], Any]) -> Any:
        real = path.resolve()
        stat = real.stat()
        if stat.st_size < _CACHE_WORTH_BYTES:
            return compute()
        name, stamp = f"{kind}:{real}", [stat.st_size, stat.st_mtime_ns]
        entry = self._read().get(name)
        if entry is not None and entry["stamp"] == stamp:
            return entry["digest"]
        digest = compute()
        write_text_atomic(
            self._path, json.dumps(self._read() | {name: {"stamp": stamp, "digest": digest}}, indent=1)
        )
        return digest

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}


def digest_config(path: Path) -> str:
    """Digest of a component's JSON configuration, without the notes on the library that saved it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}") from error
    return digest_json({key: value for key, value in config.items() if key not in _CONFIG_NOTES})


def digest_component(root: Path, config: str, weights: Iterable[str], cache: DigestCache) -> str:
    """Digest of one component of a folder: its configuration, and each weight file's name and content."""
    files = {Path(name).name: cache.file(root / name) for name in weights}
    return digest_json({"config": digest_config(root / config), "weights": files})


def digest_plain_files(root: Path, names: Iterable[str], cache: DigestCache) -> str:
    """Digest of the content of small files, as those of a tokenizer."""
    return digest_json({Path(name).name: cache.file(root / name) for name in names})


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file (tensor name -> dtype, shape, data_offsets), and where the tensors' bytes begin.

    Raises BaseModelError for a file that is not safetensors, which a truncated download or a renamed pickle is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise BaseModelError(
                f"{path} is not a safetensors file. If it is a .ckpt that was renamed, convert it."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise BaseModelError(f"{path} is not a safetensors file: its header is not JSON.") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end > size:
        raise BaseModelError(f"{path} is cut short: {size} bytes of {8 + length + end}. Download it again.")
    return header, 8 + length


def digest_tensors_by_prefix(path: Path, prefixes: dict[str, str]) -> dict[str, str]:
    """Digest the tensors under each prefix (name, dtype, shape, bytes), so that components of one file have digests of their own.

    Two checkpoints that differ in the UNet alone thus share their VAE's digest, and its latents. A component without tensors is left out.
    """
    header, data_start = read_safetensors_header(path)
    digests: dict[str, str] = {}
    with path.open("rb") as file:
        for component, prefix in prefixes.items():
            names = sorted(name for name in header if name.startswith(prefix))
            if not names:
                continue
            digest = hashlib.sha256()
            for name in names:
                begin, end = header[name]["data_offsets"]
                about = [name.removeprefix(prefix), header[name]["dtype"], header[name]["shape"]]
                digest.update(json.dumps(about).encode())
                file.seek(data_start + begin)
                for offset in range(0, end - begin, _CHUNK):
                    digest.update(file.read(min(_CHUNK, end - begin - offset)))
            digests[component] = digest.hexdigest()
    return digests
