"""`<project>.safetensors` beside a run's weights: its name, and when it is written. Imports no torch unless the file must be written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.files.atomic_files import sha256_file, write_bytes_atomic
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.files.stable_safetensors import stable_safetensors, tensors_sha256
from sdxl_pipeline.models.adapters.adapter_files import AdapterError, read_header
from sdxl_pipeline.release.formats.kohya_header import (
    approximation_entries,
    dates,
    file_hashes,
    header_entries,
    network_entries,
)
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec

VERSION: Final = 1
"""To be increased with every change of this package that changes the files it writes, so that finished runs get new ones."""

EXPORT_DIGEST: Final = "export_digest"
DTYPE: Final = "export_dtype"
_WEIGHTS_FILE: Final = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class KohyaFile:
    """A written kohya file."""

    path: Path
    sha256: str
    dtype: str
    dora_approximation: dict[str, int | float] | None


def kohya_file_name(project: str) -> str:
    """Return the name of the file, by which programs list adapters."""
    name = f"{project}.safetensors"
    return name if name != _WEIGHTS_FILE else f"{project}_kohya.safetensors"


def ensure_kohya_file(
    spec: TrainSpec, manifest: TrainedLora, weights: Path, thumbnail: Path | None = None
) -> KohyaFile:
    """Write the kohya file of `weights` beside them, unless an intact file for the same inputs exists; return it.

    Raises FormatError, without writing, when the format or the data type cannot represent the adapter.
    """
    path = weights.with_name(kohya_file_name(spec.project))
    entries = header_entries(spec, manifest, thumbnail)
    requested = spec.settings.lora_export_dtype
    digest = digest_json([VERSION, sha256_file(weights), requested, entries])
    if (existing := _existing(path, digest)) is not None:
        return existing
    from sdxl_pipeline.release.formats.kohya import choose_dtype, kohya_layers, kohya_tensors, read_trained
    from sdxl_pipeline.release.formats.layers import layer_table
    from sdxl_pipeline.release.formats.weight_updates import BaseWeights

    table = layer_table(spec.base_model.config_path)
    with BaseWeights(spec.base_model) as base:
        layers, approximation = kohya_layers(read_trained(weights, table), base)
    dtype = choose_dtype(layers, requested)
    summary = None if approximation is None else approximation.summary
    entries |= network_entries(spec.settings, layers, None if approximation is None else approximation.rank)
    if approximation is not None:
        entries |= approximation_entries(approximation.summary, approximation.layer_errors)
    entries |= dates(manifest, weights) | {EXPORT_DIGEST: digest, DTYPE: dtype}
    tensors = kohya_tensors(layers, dtype)
    data = stable_safetensors(tensors, entries | file_hashes(tensors, entries))
    write_bytes_atomic(path, data)
    return KohyaFile(path, sha256_file(path), dtype, summary)


def read_approximation(metadata: Mapping[str, str]) -> dict[str, int | float] | None:
    """Return the approximation that a file's header records; None if the file is exact."""
    recorded: dict[str, Any] = json.loads(metadata.get("dora_approximation", "null")) or {}
    return {name: value for name, value in recorded.items() if name != "layer_errors"} or None


def _existing(path: Path, digest: str) -> KohyaFile | None:
    if not path.is_file():
        return None
    try:
        metadata = read_header(path).metadata
    except AdapterError:  # corrupt, so the file is written again
        return None
    intact = metadata.get("sshs_model_hash") == tensors_sha256(path.read_bytes())
    if not intact or metadata.get(EXPORT_DIGEST) != digest:
        return None
    return KohyaFile(path, sha256_file(path), metadata[DTYPE], read_approximation(metadata))
