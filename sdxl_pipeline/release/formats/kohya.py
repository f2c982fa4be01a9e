"""Conversion of an adapter to kohya's key grammar with SGM's names and alpha tensors, which every SDXL program reads.

The source is the file in diffusers' or LyCORIS' format, so a finished run is converted without training. A weight-decomposed adapter
(DoRA) is approximated by a plain LoRA, because other programs compute the decomposition by a different formula.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_pipeline.config.schema.release import ExportDtype
from sdxl_pipeline.models.adapters.adapter_files import read_header
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.layers import (
    ALPHA,
    DOWN,
    NORMS,
    UP,
    LayerParts,
    LayerTable,
    read_diffusers,
    read_lycoris,
)
from sdxl_pipeline.release.formats.weight_updates import BaseWeights, decomposed, update_of

APPROXIMATION_RANK: Final = 64
"""Rank of the plain LoRA that approximates a weight-decomposed adapter; twice the adapter's rank if that is higher."""

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_ROUNDING: Final = 2.0**-7
"""Relative error of an update whose two factors are rounded to bfloat16; `auto` chooses bfloat16 where float16 is worse than this."""


@dataclass(frozen=True)
class Approximation:
    """Error of the plain LoRA that approximates a weight-decomposed adapter, in relative Frobenius norms."""

    rank: int
    relative_error: float
    layer_errors: Mapping[str, float]

    @property
    def summary(self) -> dict[str, int | float]:
        """The values that the manifest records."""
        return {
            "rank": self.rank,
            "relative_error": self.relative_error,
            "largest_layer_error": max(self.layer_errors.values()),
        }


def read_trained(path: Path, table: LayerTable) -> LayerParts:
    """Return the layers of the file that a run wrote, in diffusers' or LyCORIS' format."""
    file, tensors = read_header(path), load_file(path)
    if file.kind == "lycoris":
        return read_lycoris(tensors, table)
    return read_diffusers(tensors, file.metadata, table)


def kohya_layers(trained: LayerParts, base: BaseWeights) -> tuple[LayerParts, Approximation | None]:
    """Return the layers of the kohya file, and the approximation if weights were decomposed.

    Raises FormatError for a layer that has no name in kohya's grammar.
    """
    unnamed = sorted(layer.module for layer in trained if layer.kohya is None)
    if unnamed:
        raise FormatError(
            f"{', '.join(unnamed[:3])}: kohya's files have no name for this layer. Set lora_format to diffusers, or do not train the layer."
        )
    layers: LayerParts = {}
    errors: dict[str, tuple[float, float]] = {}
    rank = max(
        [APPROXIMATION_RANK, *(2 * parts[DOWN].shape[0] for parts in trained.values() if DOWN in parts)]
    )
    for layer, parts in trained.items():
        if NORMS not in parts:
            layers[layer] = parts
            continue
        exact = decomposed(base.weight(layer), update_of(layer, parts), parts[NORMS])
        layers[layer] = low_rank(exact, rank)
        error = (update_of(layer, layers[layer]) - exact).norm()
        errors[f"{layer.model}.{layer.module}"] = (float(error), float(exact.norm()))
    if not errors:
        return layers, None
    return layers, Approximation(
        rank, error_ratio(errors.values()), {name: error_ratio([pair]) for name, pair in errors.items()}
    )


def low_rank(update: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the factors of the nearest update of at most this rank, by truncated SVD.

    Alpha is `rank` for all layers, even where a small layer has a lower rank: diffusers' loader drops the alpha of an attention layer that
    differs from the others.
    """
    return factors(*truncated_svd(update.flatten(1), rank), update.shape, float(rank))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return left (rows, r), values (r) and right (columns, r) vectors of the r = min(rank, rows, columns) largest singular values.

    Randomized with a fixed seed (Halko et al. 2011, arXiv:0909.4061), with 16 more columns than `rank` and 4 power iterations.
    """
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    return left[:, :rank], values[:rank], right[:, :rank]


def factors(
    left: Tensor, values: Tensor, right: Tensor, shape: Sequence[int], alpha: float
) -> dict[str, Tensor]:
    """Return the LoRA of the matrix left diag(values) right^T for a weight of `shape`; both factors have the same norm."""
    rank, kernel = len(values), shape[2:]
    root = (values * rank / alpha).sqrt()
    return {
        DOWN: (right * root).T.reshape(rank, shape[1], *kernel).contiguous(),
        UP: (left * root).reshape(shape[0], rank, *[1] * len(kernel)).contiguous(),
        ALPHA: torch.tensor(alpha),
    }


def cast(parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in `dtype`; an alpha that `dtype` cannot represent exactly stays float32, since it scales the entire update."""
    tensors = {name: tensor.to(dtype) for name, tensor in parts.items()}
    alpha = parts[ALPHA].float()
    return tensors | {ALPHA: tensors[ALPHA] if float(tensors[ALPHA]) == float(alpha) else alpha}


def choose_dtype(layers: LayerParts, requested: ExportDtype) -> str:
    """Return the requested data type; for `auto` float16, or bfloat16 where float16 has a larger rounding error than bfloat16.

    Raises FormatError if values overflow the requested type.
    """
    name = "float16" if requested == "auto" else requested
    error = _rounding_error(layers, DTYPES[name])
    if error <= _ROUNDING or (requested != "auto" and error < float("inf")):
        return name
    if requested == "auto":
        return "bfloat16"
    raise FormatError(
        f"lora_export_dtype {requested} cannot represent the adapter's values: some would be infinite. Set it to bfloat16 or float32, or remove it."
    )


def kohya_tensors(layers: LayerParts, dtype: str) -> dict[str, Tensor]:
    """Return the tensors of the file by name."""
    return {
        f"{layer.kohya}.{part}": tensor
        for layer, parts in layers.items()
        for part, tensor in cast(parts, DTYPES[dtype]).items()
    }


def _rounding_error(layers: LayerParts, dtype: torch.dtype) -> float:
    """Return the largest relative error of a layer's update after the cast; infinity where a value overflows."""
    largest = 0.0
    for layer, parts in layers.items():
        rounded = cast(parts, dtype)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in rounded.values()):
            return float("inf")
        exact = update_of(layer, parts)
        norm = float(exact.norm())
        if norm:
            largest = max(largest, float((update_of(layer, rounded) - exact).norm()) / norm)
    return largest


def error_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """Return the norm of the errors over the norm of the updates."""
    pairs = list(pairs)
    total = sum(norm**2 for _, norm in pairs) ** 0.5
    return float(sum(error**2 for error, _ in pairs) ** 0.5 / total) if total else 0.0
