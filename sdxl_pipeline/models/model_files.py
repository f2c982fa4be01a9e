"""The files of a model folder or single file, and their digests.

A repository like stabilityai/stable-diffusion-xl-base-1.0 has the same weights many times: fp32 and fp16 safetensors, a single-file
checkpoint, ONNX, OpenVINO and Flax. fp16 safetensors are preferred for every component: they halve the download (7 GB rather than 14),
and the frozen base model computes in bf16 or fp16 anyway. This concerns only storage: the VAE's fp16 file is loaded to bf16 or fp32, so
the overflow of SDXL's VAE in fp16 *arithmetic* does not occur.

Weights of many gigabytes are hashed once: their digests are cached in a small JSON file, with the size and modification time of the file.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import sha256_file, write_text_atomic
from sdxl_pipeline.files.digest import digest_json

PREFERRED_VARIANT = "fp16"
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
MODEL_INDEX = "model_index.json"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model")


class BaseModelError(Exception):
    """The base model cannot be used. The message gives the component, the problem and a fix."""


@dataclass(frozen=True)
class ComponentFiles:
    """Files of one component as paths relative to the model's root, and their variant."""

    config: str
    weights: tuple[str, ...]
    variant: str | None


def choose_component(
    names: Collection[str], component: str, source: str, folder: str | None = None
) -> ComponentFiles:
    """Choose the weights of `component` among the file names of a model.

    `folder` is the component's folder below the root, by default its own name; "" is the root. Raises BaseModelError when there is no
    configuration, or no safetensors file.
    """
    folder = component if folder is None else folder
    prefix = f"{folder}/" if folder else ""
    location = f"`{folder}`" if folder else "its root folder"
    config = f"{prefix}config.json"
    if config not in names:
        raise BaseModelError(
            f"{source}: {config} is missing, so this is not a diffusers folder with a {component}. "
            "Give a diffusers folder, a Hub id of one, or a single .safetensors checkpoint."
        )
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    for variant in (PREFERRED_VARIANT, None):
        weights = sorted(
            name for name in inside if _weights_pattern(WEIGHT_STEMS[component], variant).match(name)
        )
        if any(name.endswith(".safetensors") for name in weights):
            return ComponentFiles(config, tuple(prefix + name for name in weights), variant)
    if pickled := sorted(name for name in inside if name.endswith(_PICKLES)):
        raise BaseModelError(
            f"{source}: {location} has the {component} only as {', '.join(pickled)}. Such files can run code when they are opened, so "
            "only .safetensors are loaded here. Choose a repository that has them, or convert a copy you trust once: load it with "
            "diffusers and call save_pretrained(folder, safe_serialization=True), then give that folder."
        )
    raise BaseModelError(
        f"{source}: {location} has no {WEIGHT_STEMS[component]}*.safetensors, the weights of the {component}."
    )


def choose_tokenizer(names: Collection[str], tokenizer: str, source: str) -> tuple[str, ...]:
    """Return the files of `tokenizer` or `tokenizer_2`. Raises BaseModelError when its vocabulary is missing."""
    files = sorted(
        name for name in names if name.startswith(f"{tokenizer}/") and name.endswith(_TOKENIZER_SUFFIXES)
    )
    kinds = {name.removeprefix(f"{tokenizer}/") for name in files}
    if "tokenizer.json" not in kinds and not {"vocab.json", "merges.txt"} <= kinds:
        raise BaseModelError(
            f"{source}: {tokenizer}/ lacks vocab.json and merges.txt (or tokenizer.json), the vocabulary of CLIP. "
            "Copy the folders tokenizer and tokenizer_2 of stabilityai/stable-diffusion-xl-base-1.0 there."
        )
    return tuple(files)


def _weights_pattern(stem: str, variant: str | None) -> re.Pattern[str]:
    """Return a pattern for the names of a single file, of shards and of their index, in old and new diffusers and transformers."""
    stem = re.escape(stem)
    shard = r"-\d{5}-of-\d{5}"
    if variant is None:
        return re.compile(rf"^{stem}({shard})?\.safetensors$|^{stem}\.safetensors\.index\.json$")
    single = rf"{stem}\.{variant}({shard})?\.safetensors"
    old_shard = rf"{stem}{shard}\.{variant}\.safetensors"
    return re.compile(rf"^({single}|{old_shard}|{stem}\.safetensors\.index\.{variant}\.json)$")


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
        # diffusers writes -Infinity, which JSON does not have and a digest refuses
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
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
