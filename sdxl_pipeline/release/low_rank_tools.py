"""Weighted sums, changes of rank, and extraction of LoRAs from fine-tuned models, one layer at a time.

The best approximation of a given rank in the Frobenius norm is the truncated SVD (Eckart and Young 1936). A product of two LoRA factors
is decomposed exactly and cheaply through the QR decompositions of the factors; other updates are decomposed as matrices.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.config.schema.release import ExportDtype
from sdxl_pipeline.models.adapters.adapter_files import UNET
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.adapter_sources import (
    AdapterSource,
    Updates,
    describe,
    layer_update,
    require_base,
    require_new_file,
    resolve_named_model,
    summed_updates,
    write_lora,
)
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.kohya import Approximation, factors, truncated_svd
from sdxl_pipeline.release.formats.layers import ALPHA, DOWN, UP, Layer, LayerParts, LayerTable
from sdxl_pipeline.release.formats.weight_updates import BaseWeights
from sdxl_pipeline.release.unet_folder import open_tensors

Decomposition = tuple[Tensor, Tensor, Tensor]
"""Left vectors (rows, r), singular values (r) in descending order, and right vectors (columns, r)."""


def write_sum(
    output: Path,
    sources: Sequence[AdapterSource],
    table: LayerTable,
    base: BaseWeights | None,
    rank: int | None,
    dtype: ExportDtype,
) -> Approximation:
    """Write the weighted sum of adapters as one LoRA: exactly, with the sum of their ranks, or of at most `rank`.

    Raises FormatError without `rank` for an adapter whose updates are not products of two matrices (DoRA, LoHa, LoKr, Tucker).
    """
    require_new_file(output)
    require_base(sources, base)
    layers = _concatenated(sources) if rank is None else _reduced(sources, base, rank, None)
    origin = {"operation": "merge", "sources": describe(sources)}
    return write_lora(output, layers, lambda: summed_updates(sources, base), table, dtype, origin)


def write_resized(
    output: Path,
    source: AdapterSource,
    table: LayerTable,
    base: BaseWeights | None,
    rank: int | None,
    error: float | None,
    dtype: ExportDtype,
) -> Approximation:
    """Write an adapter as a LoRA of at most `rank`, or of the lowest rank per layer with at most the relative `error`.

    Raises FormatError for an `error` that rounding to `dtype` exceeds.
    """
    require_new_file(output)
    require_base([source], base)
    layers = _reduced([source], base, rank, error)
    origin = {"operation": "resize", "sources": describe([source])}
    return write_lora(output, layers, lambda: summed_updates([source], base), table, dtype, origin, error)


def write_extracted(
    output: Path, tuned: str, base_model: ResolvedModel, table: LayerTable, rank: int, dtype: ExportDtype
) -> tuple[Approximation, int]:
    """Write the difference of a fine-tuned model to its base model as a LoRA of `rank`.

    `tuned` is a model by name, or the folder of a UNet. Return the error and the number of the UNet's biases and norms that differ, which
    no LoRA contains. Raises FormatError if the models have different shapes or equal weights.
    """
    require_new_file(output)
    with BaseWeights(base_model) as base, _TunedWeights(tuned, base_model) as trained:
        exact = _differences(trained, base, table)
        parts = {layer: truncated_svd(update.flatten(1), rank) for layer, update in exact()}
        if not parts:
            raise FormatError(
                f"{tuned}: no layer differs from {base_model.source}, so there is nothing to extract"
            )
        layers = {layer: factors(*part, layer.shape, float(rank)) for layer, part in parts.items()}
        origin = {
            "operation": "extract",
            "model": Path(tuned).name,
            "base_model_sha256": base_model.unet_digest,
        }
        error = write_lora(output, layers, exact, table, dtype, origin)
        return error, _count_other_differences(trained, base, base_model)


class _TunedWeights(BaseWeights):
    """Weights of a fine-tuned model, or of the folder of a UNet, whose text encoders are the base model's."""

    def __init__(self, name: str, base_model: ResolvedModel) -> None:
        folder = Path(name).expanduser()
        self.is_unet = (
            folder.is_dir()
            and not (folder / "model_index.json").exists()
            and any(folder.glob("*.safetensors"))
        )
        super().__init__(base_model if self.is_unet else resolve_named_model(name))
        self.name = name
        if self.is_unet:
            tensors = self._files.enter_context(open_tensors(folder))
            self._folder_tensors = tensors

    def unet_tensor(self, name: str) -> Tensor:
        if not self.is_unet:
            return super().unet_tensor(name)
        if name not in self._folder_tensors:
            raise FormatError(f"{self.name} has no tensor {name}")
        return self._folder_tensors[name].float()


def _differences(tuned: _TunedWeights, base: BaseWeights, table: LayerTable) -> Updates:
    def differences() -> Iterator[tuple[Layer, Tensor]]:
        for layer in table.layers:
            if layer.model != UNET and tuned.is_unet:
                continue
            before, after = base.weight(layer), tuned.weight(layer)
            if before.shape != after.shape:
                raise FormatError(
                    f"{tuned.name}: {layer.module} has the shape {tuple(after.shape)} instead of {tuple(before.shape)}, so it is another architecture than the base model"
                )
            if not torch.equal(before, after):
                yield layer, after - before

    return differences


def _count_other_differences(tuned: BaseWeights, base: BaseWeights, model: ResolvedModel) -> int:
    """Return the number of the UNet's tensors that are not weights of a layer and differ."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(model.config_path, subfolder=UNET)
        )
    others = [name for name, value in unet.state_dict().items() if value.ndim < 2]
    return sum(not torch.equal(tuned.unet_tensor(name), base.unet_tensor(name)) for name in others)


def _concatenated(sources: Sequence[AdapterSource]) -> LayerParts:
    """Return the sum of plain LoRAs: their factors one after the other. Alpha is equal in all layers, see `kohya.low_rank`."""
    for source in sources:
        other = next((layer for layer in source.layers if not source.plain(layer)), None)
        if other is not None:
            raise FormatError(
                f"{source.path.name}: the update of {other.module} is not a product of two matrices (DoRA, LoHa, LoKr or Tucker), so no LoRA equals "
                "it; add --rank to write the nearest LoRA of that rank"
            )
    products = {layer: _product(layer, sources) for layer in _layers(sources)}
    alpha = max(down.shape[0] for _, down in products.values())
    return {
        layer: {
            UP: (up * (down.shape[0] / alpha)).reshape(layer.shape[0], -1, *[1] * len(layer.shape[2:])),
            DOWN: down.reshape(-1, *layer.shape[1:]),
            ALPHA: torch.tensor(float(alpha)),
        }
        for layer, (up, down) in products.items()
    }


def _reduced(
    sources: Sequence[AdapterSource], base: BaseWeights | None, rank: int | None, error: float | None
) -> LayerParts:
    parts = {layer: _decomposition(layer, sources, base, rank, error) for layer in _layers(sources)}
    alpha = float(rank or max(len(values) for _, values, _ in parts.values()))
    return {layer: factors(*part, layer.shape, alpha) for layer, part in parts.items()}


def _decomposition(
    layer: Layer,
    sources: Sequence[AdapterSource],
    base: BaseWeights | None,
    rank: int | None,
    error: float | None,
) -> Decomposition:
    if all(source.plain(layer) for source in sources if layer in source.layers):
        left, values, right = product_svd(*_product(layer, sources))
    else:
        update = layer_update(layer, sources, base).flatten(1)
        if rank is not None:
            return truncated_svd(update, rank)
        left, values, rows = torch.linalg.svd(update, full_matrices=False)
        right = rows.T
    kept = rank if rank is not None else rank_for_error(values, error or 0.0)
    return left[:, :kept], values[:kept], right[:, :kept]


def product_svd(up: Tensor, down: Tensor) -> Decomposition:
    """Return the SVD of up @ down, (rows, r) and (r, columns), through QR decompositions of both and the SVD of an r x r matrix."""
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ inner_left, values, right @ inner_right.T


def rank_for_error(values: Tensor, error: float) -> int:
    """Return the lowest rank whose relative Frobenius error, the norm of the dropped singular values, is at most `error`."""
    squares = values.double().square()
    dropped = squares.flip(0).cumsum(0).flip(0)  # dropped[r]: without the r largest
    return max(1, int((dropped > error**2 * squares.sum()).sum()))


def _product(layer: Layer, sources: Sequence[AdapterSource]) -> tuple[Tensor, Tensor]:
    """Return up (rows, r) and down (r, columns) whose product is the sum of the plain sources' updates."""
    ups, downs = [], []
    for source in sources:
        if (parts := source.layers.get(layer)) is not None:
            down = parts[DOWN].float().flatten(1)
            ups.append(parts[UP].float().flatten(1) * (source.scale * float(parts[ALPHA]) / down.shape[0]))
            downs.append(down)
    return torch.cat(ups, dim=1), torch.cat(downs)


def _layers(sources: Sequence[AdapterSource]) -> list[Layer]:
    return list(dict.fromkeys(layer for source in sources for layer in source.layers))
