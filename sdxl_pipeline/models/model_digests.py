"""Content digests of a model's files, independent of their paths and modification times.

Weights of many gigabytes are hashed once: their digests are cached in a small JSON file, with the size and modification time of the file.
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

_MIN_CACHED_BYTES = 1 << 20
_CHUNK = 1 << 20
# written by the saving library; they do not affect the model
_IGNORED_CONFIG_KEYS = ("_name_or_path", "_diffusers_version", "transformers_version")


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/sdxl-pipeline`, by default ~/.cache/sdxl-pipeline."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-pipeline"


class DigestCache:
    """Persistent digests of large files in `<cache_dir>/file_digests.json`.

    An entry is valid for the size and modification time of its file. Concurrent writers may lose each other's entries, which are then
    computed again.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "file_digests.json"

    def file(self, path: Path) -> str:
        """Return the SHA-256 of the full file."""
        return self._cached(path, "whole", lambda: sha256_file(path))

    def single_file_components(self, path: Path) -> dict[str, str]:
        """Return a digest per SDXL component of a single-file checkpoint; see `digest_tensors_by_prefix`."""
        found: dict[str, str] = self._cached(
            path, "components", lambda: digest_tensors_by_prefix(path, SINGLE_FILE_PREFIXES)
        )
        return found

    def _cached(self, path: Path, kind: str, compute: Callable[[], Any]) -> Any:
        real = path.resolve()
        stat = real.stat()
        if stat.st_size < _MIN_CACHED_BYTES:
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
    """Return the digest of a component's JSON configuration, without the saving library's notes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON: {error}") from error
    return digest_json({key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS})


def digest_component(root: Path, config: str, weights: Iterable[str], cache: DigestCache) -> str:
    """Return the digest of one component of a folder: its configuration, and each weight file's name and content."""
    files = {Path(name).name: cache.file(root / name) for name in weights}
    return digest_json({"config": digest_config(root / config), "weights": files})


def digest_plain_files(root: Path, names: Iterable[str], cache: DigestCache) -> str:
    """Return the digest of the content of small files, such as a tokenizer's."""
    return digest_json({Path(name).name: cache.file(root / name) for name in names})


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file (tensor name -> dtype, shape, data_offsets), and the offset of the tensors' bytes.

    Raises BaseModelError for a file that is not safetensors, such as a truncated download or a renamed pickle.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise BaseModelError(f"{path} is not a safetensors file. If it is a renamed .ckpt, convert it.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise BaseModelError(f"{path} is not a safetensors file: its header is not JSON.") from error
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end > size:
        raise BaseModelError(
            f"{path} is truncated: it has {size} of {8 + length + end} bytes. Download it again."
        )
    return header, 8 + length


def digest_tensors_by_prefix(path: Path, prefixes: dict[str, str]) -> dict[str, str]:
    """Return the digest of the tensors under each prefix (name, dtype, shape, bytes), for separate digests of a file's components.

    Checkpoints that differ only in the UNet thus share the VAE's digest, and its latents. A component without tensors is omitted.
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
                tensor_info = [name.removeprefix(prefix), header[name]["dtype"], header[name]["shape"]]
                digest.update(json.dumps(tensor_info).encode())
                file.seek(data_start + begin)
                for offset in range(0, end - begin, _CHUNK):
                    digest.update(file.read(min(_CHUNK, end - begin - offset)))
            digests[component] = digest.hexdigest()
    return digests
