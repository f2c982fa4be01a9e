"""The check of a run's files before they are published: each is read strictly and does what was trained.

A reader that does not know a name, a shape or an alpha applies the rest of the file all the same, so what this check refuses would give
wrong images without an error.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sdxl_pipeline.config.schema.release import LoraFormat
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter_files import AdapterError, read_header
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.kohya import cast, read_trained
from sdxl_pipeline.release.formats.layers import (
    ALPHA,
    NORMS,
    Layer,
    LayerParts,
    layer_table,
    read_kohya,
)
from sdxl_pipeline.release.formats.weight_updates import BaseWeights, update_of, updates
from sdxl_pipeline.runtime.specs import TrainedLora

TOLERANCE = 1e-5
"""Relative difference of a layer's update from the trained one, after both are cast to the file's data type."""

_DORA_TOLERANCE = 0.01
"""Of the recorded error of an approximation: absolute, for the rounding of the file."""


def check_files(lora: TrainedLora, base_model: ResolvedModel, wanted: LoraFormat) -> str:
    """Return in one sentence what the files of an adapter hold. Raise FormatError, which says what is wrong, unless they load everywhere.

    Of the base model nothing is loaded but its architecture, except for a weight-decomposed adapter, whose approximation is measured
    against its weights.
    """
    try:
        table = layer_table(base_model.config_path)
        trained_path = Path(lora.weights_path)
        trained = _named(trained_path, lambda: read_trained(trained_path, table))
        _require_sound(trained, trained_path)
        if len(trained) != lora.adapted_modules:
            raise FormatError(
                f"{trained_path.name} holds {len(trained)} layers, and {lora.adapted_modules} were trained"
            )
        if wanted == "diffusers":
            return f"{len(trained)} layers in {trained_path.name}. Only diffusers and InvokeAI read it: lora_format is diffusers."
        kohya_path = _recorded_file(lora)
        tensors = load_file(kohya_path)
        kohya = _named(kohya_path, lambda: read_kohya(tensors, table))
        _require_sound(kohya, kohya_path)
        _require_same_layers(kohya, trained, kohya_path)
        decomposed = any(NORMS in parts for parts in trained.values())
        if decomposed:
            error = _check_approximation(kohya, trained, base_model, kohya_path)
            agreement = f"a plain LoRA whose updates differ from the DoRA's by {error:.3g} (relative)"
        else:
            _require_equal_updates(kohya, trained, kohya_path)
            agreement = f"updates equal to the trained ones to {TOLERANCE:g} in {lora.kohya_dtype}"
    except (AdapterError, OSError, SafetensorError) as error:
        raise FormatError(str(error)) from error
    return f"{len(kohya)} of {len(trained)} layers in {kohya_path.name} have kohya's names; {agreement}."


def _recorded_file(lora: TrainedLora) -> Path:
    if lora.kohya_path is None or not Path(lora.kohya_path).is_file():
        raise FormatError(
            f"{lora.run_dir} holds no file for ComfyUI, A1111 and kohya. Materialize lora again: it is written without training"
        )
    if sha256_file(Path(lora.kohya_path)) != lora.kohya_sha256:
        raise FormatError(f"{lora.kohya_path} was changed since it was written. Materialize lora again")
    return Path(lora.kohya_path)


def _named(path: Path, read: Callable[[], LayerParts]) -> LayerParts:
    try:
        return read()
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from error


def _require_sound(layers: LayerParts, path: Path) -> None:
    """Raise FormatError for a wrong shape or alpha, NaN or infinity, or updates that are all zero."""
    changes = False
    for layer, parts in layers.items():
        broken = sorted(part for part, tensor in parts.items() if not bool(torch.isfinite(tensor).all()))
        if broken:
            raise FormatError(f"{path.name}: {_name(layer)}.{broken[0]} holds NaN or infinity")
        if float(parts[ALPHA]) <= 0:
            raise FormatError(f"{path.name}: {_name(layer)} has alpha {float(parts[ALPHA]):g}")
        if NORMS in parts and parts[NORMS].numel() != layer.shape[0]:
            raise FormatError(
                f"{path.name}: {_name(layer)} has {parts[NORMS].numel()} norms for {layer.shape[0]} rows"
            )
        changes = bool(_named_update(layer, parts, path).any()) or changes
    if not changes:
        raise FormatError(f"{path.name} changes nothing: all its updates are zero")


def _require_same_layers(kohya: LayerParts, trained: LayerParts, path: Path) -> None:
    for layers, what in (
        (trained.keys() - kohya.keys(), "lacks trained layers"),
        (kohya.keys() - trained.keys(), "holds layers that were not trained"),
    ):
        if layers:
            names = sorted(map(_name, layers))
            raise FormatError(f"{path.name} {what}: {', '.join(names[:3])} ({len(names)} in all)")
    decomposed = sorted(_name(layer) for layer, parts in kohya.items() if NORMS in parts)
    if decomposed:
        raise FormatError(
            f"{path.name}: {decomposed[0]}.{NORMS}: ComfyUI and A1111 compute weight decomposition by another formula"
        )


def _require_equal_updates(kohya: LayerParts, trained: LayerParts, path: Path) -> None:
    for layer, parts in kohya.items():
        dtype = next(tensor.dtype for part, tensor in parts.items() if part != ALPHA)
        wanted = update_of(layer, cast(trained[layer], dtype))
        error = float((update_of(layer, parts) - wanted).norm())
        if not error <= TOLERANCE * float(wanted.norm()):
            raise FormatError(
                f"{path.name}: the update of {_name(layer)} differs from the trained one: norm of the difference {error:.3g}, of the update "
                f"{float(wanted.norm()):.3g}"
            )


def _check_approximation(
    kohya: LayerParts, trained: LayerParts, base_model: ResolvedModel, path: Path
) -> float:
    """Return the relative error of the file's updates, measured here; raise FormatError where the header claims a smaller one."""
    errors = sizes = 0.0
    with BaseWeights(base_model) as base:
        for layer, wanted in updates(trained, base):
            errors += float((update_of(layer, kohya[layer]) - wanted).norm()) ** 2
            sizes += float(wanted.norm()) ** 2
    measured = float((errors / sizes) ** 0.5) if sizes else 0.0
    recorded = json.loads(read_header(path).metadata.get("dora_approximation", "{}")).get("relative_error")
    if recorded is None or not measured <= recorded + _DORA_TOLERANCE:
        raise FormatError(
            f"{path.name}: its updates differ from the DoRA's by {measured:.3g} (relative), and its header says {recorded}"
        )
    return measured


def _named_update(layer: Layer, parts: Mapping[str, Tensor], path: Path) -> Tensor:
    try:
        return update_of(layer, parts)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from error


def _name(layer: Layer) -> str:
    return f"{layer.model}.{layer.module}"
