"""Conversion of an optimizer's state to tensors for safetensors and data for JSON, and back, bit for bit and without pickle.

Tensors are named by their position: "state.<parameter index>.<name>" and "group.<index>.<name>", longer for nested state. In the plain
data a tensor is omitted, or, inside a list or a tensor composed of others, replaced by its name. Of tensor subclasses only those of
torchao's optimizers are supported; of their classes nothing but the name is written.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

_TENSOR: Final = "tensor"
_TUPLE: Final = "tuple"
_SUBCLASS: Final = "tensor class"
_SUBCLASSES: Final = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return torch's `Optimizer.state_dict()` as tensors by name and plain data. Raises TypeError for state that is neither."""
    tensors: dict[str, Tensor] = {}
    values = {
        str(index): _plain_entries(entries, f"state.{index}", tensors)
        for index, entries in state["state"].items()
    }
    groups = [
        _plain_entries(group, f"group.{index}", tensors) for index, group in enumerate(state["param_groups"])
    ]
    return tensors, {"values": values, "param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that was given to `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {
        int(index): {name: _restored(value, tensors) for name, value in entries.items()}
        for index, entries in metadata["values"].items()
    }
    groups = [
        # sequences in torch's options are tuples, except for the parameter indices
        {
            name: tuple(value) if isinstance(value, list) and name != "params" else _restored(value, tensors)
            for name, value in group.items()
        }
        for group in metadata["param_groups"]
    ]
    for full_name, tensor in tensors.items():
        kind, index, name = full_name.split(".", 2)
        if "." not in name:
            (state if kind == "state" else groups)[int(index)][name] = tensor
    return {"state": state, "param_groups": groups}


def _plain_entries(entries: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    plain = {}
    for name, value in entries.items():
        if type(value) is Tensor:
            tensors[f"{path}.{name}"] = value
        else:
            plain[name] = _plain(value, f"{path}.{name}", tensors, top=True)
    return plain


def _plain(value: Any, path: str, tensors: dict[str, Tensor], top: bool = False) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and type(value).__name__ in _SUBCLASSES:
        names, attributes = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: _plain(getattr(value, name), f"{path}.{name}", tensors) for name in names}
        return {
            _SUBCLASS: type(value).__name__,
            "parts": parts,
            "attributes": [_attribute(attribute) for attribute in attributes],
        }
    if isinstance(value, Tensor):
        tensors[f"{path}.value"] = value.as_subclass(Tensor)
        return {_TENSOR: f"{path}.value"}
    if isinstance(value, Mapping):
        return {key: _plain(entry, f"{path}.{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [_plain(entry, f"{path}.{index}", tensors) for index, entry in enumerate(value)]
        return {_TUPLE: entries} if isinstance(value, tuple) and not top else entries
    raise TypeError(f"{path}: an optimizer's state of type {type(value).__name__} cannot be saved")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if value.keys() == {_TUPLE}:
        return tuple(_restored(value[_TUPLE], tensors))
    if _SUBCLASS in value:
        name = value[_SUBCLASS]
        tensor_class = getattr(importlib.import_module(_SUBCLASSES[name]), name)
        parts = {part: _restored(entry, tensors) for part, entry in value["parts"].items()}
        return tensor_class.__tensor_unflatten__(
            parts, [_attribute_from(entry) for entry in value["attributes"]]
        )
    return {key: _restored(entry, tensors) for key, entry in value.items()}


def _attribute(value: Any) -> Any:
    """Return a flag, shape or dtype of a torchao tensor as plain data."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return list(value) if isinstance(value, tuple) else value


def _attribute_from(value: Any) -> Any:
    if isinstance(value, dict):
        return getattr(torch, value["dtype"])
    return torch.Size(value) if isinstance(value, list) else value
