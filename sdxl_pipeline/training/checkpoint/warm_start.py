"""Warm start: the state of another run, adapted to the settings of this one."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdxl_pipeline.config.optimizer_registry import OPTIMIZERS
from sdxl_pipeline.config.schema.optimization import OptimizationSettings
from sdxl_pipeline.training.checkpoint.checkpoints import TrainingState
from sdxl_pipeline.training.optim.lr_schedules import Schedule
from sdxl_pipeline.training.optim.optimizers import optimizer_after_one_step

_StateLayout = frozenset[tuple[str, tuple[int, ...] | bool]]
"""The optimizer state of one parameter: entry names with the shapes of tensors, or whether another value is set."""

_PER_GROUP = frozenset({"params", "lr", "initial_lr"})


def optimizer_fits(
    state: TrainingState, settings: OptimizationSettings, dtype: torch.dtype, device: str | torch.device
) -> bool:
    """Return whether the configured optimizer has the same state layout, for parameters of `dtype` on `device`, as that of `state`.

    Both have the same name. Options matter too: amsgrad adds a tensor, momentum another.
    """
    shapes = Counter(tuple(parameter.shape) for parameter in state.parameters.values())
    expected: Counter[_StateLayout] = Counter()
    for shape, count in shapes.items():
        for entries in (
            optimizer_after_one_step(settings, shape, dtype, device).state_dict()["state"].values()
        ):
            expected[_state_layout(entries)] += count
    found = Counter(map(_state_layout, state.optimizer["state"].values()))
    return found <= expected


def rebase_state(
    state: TrainingState, settings: OptimizationSettings, optimizer: Optimizer, schedule: Schedule
) -> TrainingState:
    """Return `state` with the options of `optimizer` and the learning rate of `schedule`, both as built for this run from `settings`.

    Parameters, step, and what the optimizer has learned (moments, and an adaptive step size) are preserved. If the state has no average,
    its parameters are used as one. Loss scaling is reset. A non-empty optimizer state must fit (`optimizer_fits`).
    """
    schedule.last_epoch = state.step
    learning_rates = schedule.get_last_lr()
    fresh = optimizer.state_dict()
    source = state.optimizer if state.optimizer.get("state") else fresh
    groups = [
        {**fresh_group, "lr": _like(fresh_group["lr"], lr)}
        for fresh_group, lr in zip(fresh["param_groups"], learning_rates, strict=True)
    ]
    if source is not fresh:
        # some options are set by the first step, which is not repeated
        first = optimizer.param_groups[0]["params"][0]
        probe = optimizer_after_one_step(settings, tuple(first.shape), first.dtype, first.device)
        initialized = probe.param_groups[0]
        learned = OPTIMIZERS[settings.optimizer].state_group_keys
        for group, source_group in zip(groups, source["param_groups"], strict=True):
            group |= {name: value for name, value in initialized.items() if name not in _PER_GROUP}
            group |= {name: source_group[name] for name in learned if name in source_group}
    return replace(
        state,
        optimizer={"state": source["state"], "param_groups": groups},
        schedule={**schedule.state_dict(), "last_epoch": state.step, "_step_count": state.step + 1},
        scaler=None,
        average=state.average or state.parameters,
    )


def _state_layout(entries: Mapping[str, Any]) -> _StateLayout:
    """Return the layout of one parameter's state."""
    layout: set[tuple[str, tuple[int, ...] | bool]] = set()
    for name, value in entries.items():
        if isinstance(value, Mapping):  # bitsandbytes nests its quantized state
            layout |= {(f"{name}.{inner}", shape) for inner, shape in _state_layout(value)}
        else:
            layout.add((name, tuple(value.shape) if isinstance(value, Tensor) else value is not None))
    return frozenset(layout)


def _like(old: Any, rate: float | Tensor) -> Any:
    return torch.full_like(old, float(rate)) if isinstance(old, Tensor) else float(rate)
