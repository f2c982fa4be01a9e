"""Merging adapters into a base model: each weight plus scale * update, computed in float32 and stored in the base model's data type.

Tensors are read, changed and written one at a time, so the model need not fit into memory. Every other tensor, and a folder's other files,
are copied unchanged.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.files.stable_safetensors import write_streamed_safetensors
from sdxl_pipeline.models.adapters.adapter_files import UNET
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_vae
from sdxl_pipeline.models.model_files import (
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    SINGLE_FILE_PREFIXES,
    TOKENIZERS,
    WEIGHT_STEMS,
    choose_component,
    choose_tokenizer,
    read_safetensors_header,
)
from sdxl_pipeline.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    second_text_weight,
    unet_tensors,
    vae_tensors,
)
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes
from sdxl_pipeline.release.adapter_sources import (
    SUFFIX,
    AdapterSource,
    describe,
    layer_update,
    require_new_file,
)
from sdxl_pipeline.release.formats import FormatError
from sdxl_pipeline.release.formats.layers import Layer
from sdxl_pipeline.release.release_inputs import portable_name
from sdxl_pipeline.release.single_file import MARKERS, architecture_shapes, prediction_markers
from sdxl_pipeline.release.unet_folder import LazyTensors, mismatched_weights

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
Targets = Mapping[str, Sequence[tuple[Layer, int | None]]]
"""Layers in a stored tensor, each with its third of the rows if q, k and v are fused, by the tensor's name."""


def merge_into(output: Path, sources: Sequence[AdapterSource], base_model: ResolvedModel) -> int:
    """Write the base model with the adapters merged into its weights to `output`, and return the number of changed layers.

    A name that ends in .safetensors is a single file in SDXL's original layout, any other a folder in diffusers' layout. Raises
    FormatError if the output exists, for a folder from a single-file base model, and for a weight that overflows its data type.
    """
    if output.suffix.lower() == SUFFIX:
        require_new_file(output)
        if base_model.kind == "single_file":
            _merge_file(output, sources, base_model)
        else:
            _merge_folder_to_file(output, sources, base_model)
    elif base_model.kind == "single_file":
        raise FormatError(
            f"{base_model.source} is a single file, from which no folder is written; end the name of --output in {SUFFIX}"
        )
    else:
        _merge_folder(output, sources, base_model)
    return len({layer for source in sources for layer in source.layers})


class MergedTensors(Mapping[str, Tensor]):
    """Stored tensors with the adapters' updates, each computed on access."""

    def __init__(
        self, tensors: Mapping[str, Tensor], targets: Targets, sources: Sequence[AdapterSource]
    ) -> None:
        self._tensors, self._targets, self._sources = tensors, targets, sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._targets:
            return tensor
        merged = tensor.float().clone()
        for layer, third in self._targets[name]:
            rows = merged if third is None else merged.chunk(3)[third]
            if tuple(rows.shape) != layer.shape:
                raise FormatError(
                    f"{name} of the base model has the shape {tuple(rows.shape)} instead of {layer.shape}; merge into a model with the architecture of its configuration"
                )
            rows += layer_update(layer, self._sources, None, weight=rows.clone())
        result = merged.to(tensor.dtype)
        if not torch.isfinite(result).all():
            raise FormatError(
                f"{name} with the updates is not finite in {tensor.dtype}; lower the adapters' scales"
            )
        return result


def _merge_file(output: Path, sources: Sequence[AdapterSource], model: ResolvedModel) -> None:
    with safe_open(model.path, framework="pt") as file:
        stored = LazyTensors([file])
        targets = _single_file_targets(sources, model)
        _require_complete(targets, stored, model)
        entries = {**(file.metadata() or {}), "origin": _origin(sources, model)}
        merged = MergedTensors(stored, targets, sources)
        _write(output, {name: tensor.to("meta") for name, tensor in stored.items()}, merged.items(), entries)


def _merge_folder_to_file(output: Path, sources: Sequence[AdapterSource], model: ResolvedModel) -> None:
    config = UNet2DConditionModel.load_config(model.config_path, subfolder=UNET)
    convert: dict[str, Callable[[Mapping[str, Tensor]], Iterator[tuple[str, Tensor]]]] = {
        UNET: lambda state: unet_tensors(state, config),
        "text_encoder": first_text_tensors,
        "text_encoder_2": second_text_tensors,
    }
    markers = dict(prediction_markers(model, TrainingSettings()))
    # through diffusers' loader, which renames the attention layers of old files
    markers |= vae_tensors(load_vae(model, torch.float32).state_dict())
    with ExitStack() as files:
        states = {component: _open(_weight_files(model, component), files) for component in convert}
        for component, state in states.items():
            _require_layers(component, state, sources, model)
        layout = {name: tensor.to("meta") for name, tensor in markers.items()}
        for component, state in states.items():
            layout |= convert[component]({name: tensor.to("meta") for name, tensor in state.items()})
        expected = architecture_shapes(model)
        found = {name: tuple(tensor.shape) for name, tensor in layout.items() if name not in MARKERS}
        if different := sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        ):
            raise FormatError(
                f"{model.source}: {different[0]} has the shape {found.get(different[0])} instead of {expected.get(different[0])}, so it is not the model of its configuration"
            )

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from markers.items()
            for component, state in states.items():
                merged = MergedTensors(state, _folder_targets(component, state, sources), sources)
                yield from convert[component](merged)

        _write(output, layout, tensors(), {"origin": _origin(sources, model)})


def _merge_folder(output: Path, sources: Sequence[AdapterSource], model: ResolvedModel) -> None:
    if output.exists():
        raise FormatError(
            f"{output} exists and is not overwritten; give --output another name, or delete the folder"
        )
    root = Path(model.path)
    names = [path.relative_to(root).as_posix() for path in root.glob("*/*")]
    copied = [MODEL_INDEX, SCHEDULER_CONFIG]
    copied += [name for tokenizer in TOKENIZERS for name in choose_tokenizer(names, tokenizer, model.source)]
    weights = {component: choose_component(names, component, model.source) for component in WEIGHT_STEMS}
    copied += [files.config for files in weights.values()]
    size = sum((root / name).stat().st_size for files in weights.values() for name in files.weights)
    require_space(output.parent, size, "the merged model")
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        for component, files in weights.items():
            changed = any(layer.model == component for layer in _layers(sources))
            if changed:
                with ExitStack() as opened:
                    _require_layers(component, _open(_weight_files(model, component), opened), sources, model)
            for name in files.weights:
                if changed and name.endswith(SUFFIX):
                    _merge_component_file(root / name, staging / name, component, sources)
                else:
                    copied.append(name)
        for name in copied:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, staging / name)
        write_text_atomic(staging / "merge.json", _origin(sources, model) + "\n")
        if mismatched := mismatched_weights(staging / UNET, model):
            raise FormatError(f"{model.source} lacks weights of its configuration, such as {mismatched[0]}")
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _merge_component_file(
    source: Path, target: Path, component: str, sources: Sequence[AdapterSource]
) -> None:
    with safe_open(source, framework="pt") as file:
        stored = LazyTensors([file])
        merged = MergedTensors(stored, _folder_targets(component, stored, sources), sources)
        layout = {name: tensor.to("meta") for name, tensor in stored.items()}
        _write(target, layout, merged.items(), file.metadata() or {})


def _write(
    path: Path,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    if other := next((name for name, tensor in layout.items() if tensor.dtype not in _DTYPES), None):
        raise FormatError(
            f"{path.name}: {other} of the base model is stored in {layout[other].dtype}; merge into a model in float32, float16 or bfloat16"
        )
    require_space(path.parent, sum(tensor.nbytes for tensor in layout.values()), "the merged model")
    write_streamed_safetensors(path, layout, tensors, metadata)
    read_safetensors_header(path)  # raises for an incomplete file


def _folder_targets(component: str, stored: Collection[str], sources: Sequence[AdapterSource]) -> Targets:
    """Return the targets among a component's stored tensors; transformers 5 stores text encoders without the prefix `text_model`."""
    targets: dict[str, list[tuple[Layer, int | None]]] = {}
    for layer in _layers(sources):
        if layer.model == component:
            names = (f"{layer.module}.weight", f"{layer.module.removeprefix('text_model.')}.weight")
            targets |= {name: [(layer, None)] for name in names if name in stored}
    return targets


def _single_file_targets(sources: Sequence[AdapterSource], model: ResolvedModel) -> Targets:
    prefixes = sgm_prefixes(UNet2DConditionModel.load_config(model.config_path, subfolder=UNET))
    targets: defaultdict[str, list[tuple[Layer, int | None]]] = defaultdict(list)
    for layer in _layers(sources):
        third = None
        if layer.model == UNET:
            name = f"{SINGLE_FILE_PREFIXES[UNET]}{sgm_name(layer.module, prefixes)}.weight"
        elif layer.model == "text_encoder":
            name = f"{SINGLE_FILE_PREFIXES[layer.model]}transformer.{layer.module}.weight"
        else:
            name, third = second_text_weight(layer.module.removeprefix("text_model."))
        targets[name].append((layer, third))
    return targets


def _require_layers(
    component: str, stored: Collection[str], sources: Sequence[AdapterSource], model: ResolvedModel
) -> None:
    found = {
        layer for targets in _folder_targets(component, stored, sources).values() for layer, _ in targets
    }
    required = [layer for layer in _layers(sources) if layer.model == component]
    _require_complete([layer.module for layer in required], [layer.module for layer in found], model)


def _require_complete(targets: Iterable[str], stored: Collection[str], model: ResolvedModel) -> None:
    if absent := sorted(name for name in targets if name not in stored):
        raise FormatError(
            f"{model.source} lacks {absent[0]}, which the adapter changes; merge into the base model that it was trained on"
        )


def _weight_files(model: ResolvedModel, component: str) -> list[Path]:
    root = Path(model.path)
    names = [path.relative_to(root).as_posix() for path in (root / component).iterdir()]
    chosen = choose_component(names, component, model.source).weights
    return [root / name for name in chosen if name.endswith(SUFFIX)]


def _open(paths: Iterable[Path], files: ExitStack) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of the files, without old text encoders' position ids, which the original layout adds itself."""
    tensors = LazyTensors([files.enter_context(safe_open(path, framework="pt")) for path in paths])
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def _layers(sources: Sequence[AdapterSource]) -> list[Layer]:
    return list(dict.fromkeys(layer for source in sources for layer in source.layers))


def _origin(sources: Sequence[AdapterSource], model: ResolvedModel) -> str:
    origin = {"operation": "merge", "sources": describe(sources), "base_model": portable_name(model.source)}
    return json.dumps(origin | {"base_model_digests": dict(model.digests)}, ensure_ascii=False)
