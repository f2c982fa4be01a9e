"""The check of a run's files before publication: each is read strictly and must have the same effect as the trained adapter.

Programs that do not recognize a name, a shape or an alpha still apply the rest of the file. What this check refuses would therefore give
wrong images without an error.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
"""Maximum relative difference of a layer's update from the trained one, after both are cast to the file's data type."""

_DORA_TOLERANCE = 0.01
"""Maximum absolute excess of an approximation's error over the recorded one, which allows for rounding in the file."""


def check_files(lora: TrainedLora, base_model: ResolvedModel, lora_format: LoraFormat) -> str:
    """Return in one sentence what an adapter's files contain. Raise FormatError with the reason unless every program loads them.

    Only the base model's architecture is loaded, except for a weight-decomposed adapter: its approximation is measured against the base
    model's weights.
    """
    try:
        table = layer_table(base_model.config_path)
        trained_path = Path(lora.weights_path)
        with _file_name_in_errors(trained_path):
            trained = read_trained(trained_path, table)
        require_valid(trained, trained_path)
        if len(trained) != lora.adapted_modules:
            raise FormatError(
                f"{trained_path.name} holds {len(trained)} layers, but {lora.adapted_modules} were trained"
            )
        if lora_format == "diffusers":
            return f"{len(trained)} layers in {trained_path.name}. Only diffusers and InvokeAI read it: lora_format is diffusers."
        kohya_path = _recorded_file(lora)
        with _file_name_in_errors(kohya_path):
            kohya = read_kohya(load_file(kohya_path), table)
        require_valid(kohya, kohya_path)
        _require_same_layers(kohya, trained, kohya_path)
        if any(NORMS in parts for parts in trained.values()):
            error = _check_approximation(kohya, trained, base_model, kohya_path)
            effect = f"a plain LoRA whose updates differ from the DoRA's by {error:.3g} (relative)"
        else:
            _require_equal_updates(kohya, trained, kohya_path)
            effect = f"updates equal to the trained ones to {TOLERANCE:g} in {lora.kohya_dtype}"
    except (AdapterError, OSError, SafetensorError) as error:
        raise FormatError(str(error)) from error
    return f"{len(kohya)} of {len(trained)} layers in {kohya_path.name} have kohya's names; {effect}."


def _recorded_file(lora: TrainedLora) -> Path:
    if lora.kohya_path is None or not Path(lora.kohya_path).is_file():
        raise FormatError(
            f"{lora.run_dir} has no file for ComfyUI, A1111 and kohya. Materialize lora again, which writes it without training"
        )
    if sha256_file(Path(lora.kohya_path)) != lora.kohya_sha256:
        raise FormatError(
            f"{lora.kohya_path} was modified after it was written: its SHA-256 differs. Materialize lora again"
        )
    return Path(lora.kohya_path)


@contextmanager
def _file_name_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from error


def require_valid(layers: LayerParts, path: Path) -> None:
    """Raise FormatError for a wrong shape or alpha, NaN or infinity, or updates that are all zero."""
    has_effect = False
    for layer, parts in layers.items():
        non_finite = sorted(part for part, tensor in parts.items() if not bool(torch.isfinite(tensor).all()))
        if non_finite:
            raise FormatError(f"{path.name}: {_name(layer)}.{non_finite[0]} holds NaN or infinity")
        if float(parts[ALPHA]) <= 0:
            raise FormatError(
                f"{path.name}: {_name(layer)} has alpha {float(parts[ALPHA]):g}; it must be > 0"
            )
        if NORMS in parts and parts[NORMS].numel() != layer.shape[0]:
            raise FormatError(
                f"{path.name}: {_name(layer)} has {parts[NORMS].numel()} norms for {layer.shape[0]} rows"
            )
        with _file_name_in_errors(path):
            has_effect = bool(update_of(layer, parts).any()) or has_effect
    if not has_effect:
        raise FormatError(f"{path.name} changes nothing: all its updates are zero")


def _require_same_layers(kohya: LayerParts, trained: LayerParts, path: Path) -> None:
    for layers, problem in (
        (trained.keys() - kohya.keys(), "lacks trained layers"),
        (kohya.keys() - trained.keys(), "has layers that were not trained"),
    ):
        if layers:
            names = sorted(map(_name, layers))
            raise FormatError(f"{path.name} {problem}: {', '.join(names[:3])} ({len(names)} in total)")
    decomposed = sorted(_name(layer) for layer, parts in kohya.items() if NORMS in parts)
    if decomposed:
        raise FormatError(
            f"{path.name}: {decomposed[0]}.{NORMS}: ComfyUI and A1111 compute weight decomposition by another formula"
        )


def _require_equal_updates(kohya: LayerParts, trained: LayerParts, path: Path) -> None:
    for layer, parts in kohya.items():
        dtype = next(tensor.dtype for part, tensor in parts.items() if part != ALPHA)
        expected = update_of(layer, cast(trained[layer], dtype))
        error = float((update_of(layer, parts) - expected).norm())
        if not error <= TOLERANCE * float(expected.norm()):
            raise FormatError(
                f"{path.name}: the update of {_name(layer)} differs from the trained one: norm of the difference {error:.3g}, of the update "
                f"{float(expected.norm()):.3g}"
            )


def _check_approximation(
    kohya: LayerParts, trained: LayerParts, base_model: ResolvedModel, path: Path
) -> float:
    """Return the measured relative error of the file's updates; raise FormatError if the header records a smaller one."""
    squared_error = squared_norm = 0.0
    with BaseWeights(base_model) as base:
        for layer, expected in updates(trained, base):
            squared_error += float((update_of(layer, kohya[layer]) - expected).norm()) ** 2
            squared_norm += float(expected.norm()) ** 2
    measured = float((squared_error / squared_norm) ** 0.5) if squared_norm else 0.0
    recorded = json.loads(read_header(path).metadata.get("dora_approximation", "{}")).get("relative_error")
    if recorded is None or not measured <= recorded + _DORA_TOLERANCE:
        raise FormatError(
            f"{path.name}: its updates differ from the DoRA's by {measured:.3g} (relative), but its header records {recorded}"
        )
    return measured


def _name(layer: Layer) -> str:
    return f"{layer.model}.{layer.module}"
