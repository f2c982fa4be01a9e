"""Adapter files of any format as input of merge, extract and resize, and the LoRA file that they write.

A LoRA, DoRA, LoHa or LoKr is read in diffusers', kohya's or LyCORIS' names, strictly: a name that no layer of the base model has is an
error. What is written has kohya's names, which every program reads.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdxl_pipeline.config.schema.release import ExportDtype
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import atomic_path, sha256_file
from sdxl_pipeline.files.stable_safetensors import stable_safetensors
from sdxl_pipeline.models.adapters.adapter_files import PREFIXES, AdapterError, read_header
from sdxl_pipeline.models.base_model import SDXL_BASE_CONFIGS, ResolvedModel, resolve_base_model
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.format_check import require_valid
from sdxl_pipeline.release.formats.kohya import Approximation, choose_dtype, error_ratio, kohya_tensors
from sdxl_pipeline.release.formats.kohya_header import file_hashes
from sdxl_pipeline.release.formats.layers import (
    DOWN,
    MID,
    NORMS,
    Layer,
    LayerParts,
    LayerTable,
    layer_table,
    read_diffusers,
    read_kohya,
    read_lycoris,
)
from sdxl_pipeline.release.formats.weight_updates import BaseWeights, updates

Updates = Callable[[], Iterator[tuple[Layer, Tensor]]]
"""Yields each layer's exact update in float32, one at a time; called once per reading."""

SUFFIX: Final = ".safetensors"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter file and its weight in a sum."""

    path: Path
    layers: LayerParts
    scale: float
    metadata: Mapping[str, str]

    @property
    def is_decomposed(self) -> bool:
        """Whether a layer's update depends on the base model's weight, as in a DoRA."""
        return any(NORMS in parts for parts in self.layers.values())

    def plain(self, layer: Layer) -> bool:
        """Return whether the update of `layer` is a product of two matrices."""
        return {DOWN} == {DOWN, MID, NORMS} & self.layers[layer].keys()


def resolve_named_model(name: str) -> ResolvedModel:
    """Return the base model of a Hub id, folder or .safetensors checkpoint. Raises BaseModelError."""
    return resolve_base_model(TrainingSettings(pretrained_model_name_or_path=name), Path())


def layer_names(model: ResolvedModel) -> LayerTable:
    """Return the layers of a model's architecture."""
    return layer_table(model.config_path)


@contextmanager
def open_base(name: str | None) -> Iterator[tuple[LayerTable, BaseWeights | None]]:
    """Yield the layers and weights of a base model; for None the layers of SDXL-base without weights."""
    if name is None:
        yield layer_table(SDXL_BASE_CONFIGS), None
        return
    model = resolve_named_model(name)
    with BaseWeights(model) as base:
        yield layer_table(model.config_path), base


def read_adapter(path: Path, scale: float, table: LayerTable) -> AdapterSource:
    """Read an adapter of any format. Raises FormatError or AdapterError with the file's name unless it is complete and valid."""
    header = read_header(path)
    hint = "check the file, or name its base model with --base or --into"
    try:
        tensors = load_file(path)
        if any(name.startswith("lycoris_") for name in header.names):
            layers = read_lycoris(tensors, table)
        elif any(name.partition(".")[0] in PREFIXES for name in header.names):
            layers = read_diffusers(tensors, header.metadata, table)
        else:
            layers = read_kohya(tensors, table)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}; {hint}") from error
    except SafetensorError as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        require_valid(layers, path)
    except FormatError as error:  # its message has the file's name
        raise FormatError(f"{error}; {hint}") from error
    return AdapterSource(path, layers, scale, header.metadata)


def require_base(sources: Sequence[AdapterSource], base: BaseWeights | None) -> None:
    """Raise FormatError if an update depends on the base model's weights and these are not given."""
    decomposed = next((source for source in sources if source.is_decomposed), None)
    if decomposed is not None and base is None:
        raise FormatError(
            f"{decomposed.path.name} is weight-decomposed (DoRA), so its updates depend on the base model's weights; add --base with the base model"
        )


def summed_updates(
    sources: Sequence[AdapterSource], base: BaseWeights | None
) -> Iterator[tuple[Layer, Tensor]]:
    """Yield the sum of scale * update of each layer that some source adapts, in float32."""
    require_base(sources, base)
    for layer in dict.fromkeys(layer for source in sources for layer in source.layers):
        yield layer, layer_update(layer, sources, base)


def layer_update(
    layer: Layer, sources: Sequence[AdapterSource], base: BaseWeights | None, weight: Tensor | None = None
) -> Tensor:
    """Return the sum of scale * update of one layer in float32; `weight` is the base model's, if it is already read.

    A decomposed update is scaled as a whole, as ComfyUI does.
    """
    total = torch.zeros(layer.shape)
    for source in sources:
        if layer in source.layers:
            known = base if weight is None else _KnownWeight(weight)
            ((_, update),) = updates({layer: source.layers[layer]}, known)
            total += source.scale * update
    return total


class _KnownWeight(BaseWeights):
    """The weight of a single layer that is already in memory."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def weight(self, layer: Layer) -> Tensor:
        return self._weight


def require_new_file(path: Path) -> None:
    """Raise FormatError unless `path` is the name of a .safetensors file that does not exist yet: no input is ever overwritten."""
    if path.suffix.lower() != SUFFIX:
        raise FormatError(
            f"{path} does not end in {SUFFIX}, the only format written; name the output {path.name}{SUFFIX}"
        )
    if path.exists():
        raise FormatError(
            f"{path} exists and is not overwritten; give --output another name, or delete the file"
        )


def write_lora(
    path: Path,
    layers: LayerParts,
    exact: Updates,
    table: LayerTable,
    dtype: ExportDtype,
    origin: Mapping[str, Any],
    limit: float | None = None,
) -> Approximation:
    """Write a LoRA with kohya's names and return its measured error: of the rounded tensors against the exact updates.

    `origin` is recorded in the header, together with the error. The file gets its final name after it was read back with equal tensors.
    Raises FormatError for a layer without a name in kohya's files, values that `dtype` cannot represent, or an error above `limit`.
    """
    unnamed = sorted(layer.module for layer in layers if layer.kohya is None)
    if unnamed:
        raise FormatError(
            f"{unnamed[0]}: a LoRA file has no name for this layer, so its update cannot be written"
        )
    name = choose_dtype(layers, dtype)
    tensors = kohya_tensors(layers, name)
    written = read_kohya(tensors, table)
    require_valid(written, path)
    error = measure(written, exact)
    if limit is not None and error.relative_error > limit:
        raise FormatError(
            f"--error {limit:g} is below the rounding error of {name}, with which the file has {error.relative_error:.3g}; add --dtype float32, or allow a larger error"
        )
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(error.rank),
        "ss_network_alpha": str(float(error.rank)),
        "ss_output_name": path.stem,
        "origin": json.dumps({**origin, "relative_error": error.relative_error}, ensure_ascii=False),
    }
    if any(max(layer.shape[2:], default=1) > 1 for layer in layers):
        entries["ss_network_args"] = json.dumps(
            {"conv_dim": str(error.rank), "conv_alpha": str(float(error.rank))}
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(stable_safetensors(tensors, entries | file_hashes(tensors, entries)))
        back = load_file(temporary)
        if back.keys() != tensors.keys() or not all(torch.equal(back[key], tensors[key]) for key in tensors):
            raise FormatError(f"{path} does not read back as it was written; check the disk")
    return error


def measure(layers: LayerParts, exact: Updates) -> Approximation:
    """Return the relative Frobenius error of the layers' updates against the exact ones, in total and by layer."""
    pairs: dict[str, tuple[float, float]] = {}
    for layer, update in exact():
        found = next(updates({layer: layers[layer]}))[1] if layer in layers else torch.zeros_like(update)
        pairs[f"{layer.model}.{layer.module}"] = (float((found - update).norm()), float(update.norm()))
    rank = max(int(parts[DOWN].shape[0]) for parts in layers.values())
    return Approximation(
        rank, error_ratio(pairs.values()), {name: error_ratio([pair]) for name, pair in pairs.items()}
    )


def describe(sources: Sequence[AdapterSource]) -> list[dict[str, Any]]:
    """Return the name, digest, scale and trigger words of each source for the header, without its folder."""
    return [
        {
            "file": source.path.name,
            "sha256": sha256_file(source.path),
            "scale": source.scale,
            **({"trained_words": words} if (words := source.metadata.get("trained_words")) else {}),
        }
        for source in sources
    ]
