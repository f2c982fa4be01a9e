"""The state of another run as the state that this one goes on from, under its own settings."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdxl_pipeline.config.optimizer_registry import OPTIMIZERS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.checkpoint.checkpoints import TrainingState
from sdxl_pipeline.training.optim.lr_schedules import Schedule
from sdxl_pipeline.training.optim.optimizers import after_a_step

_Kept = frozenset[tuple[str, tuple[int, ...] | bool]]
"""What an optimizer keeps for one parameter: names, with the shapes of tensors, or whether there is anything else."""

_OWN_IN_EACH_GROUP = frozenset({"params", "lr", "initial_lr"})


def optimizer_fits(state: TrainingState, settings: TrainingSettings, device: str | torch.device) -> bool:
    """Whether the optimizer of `settings` keeps on `device` what the one of `state`, of the same name, has kept for its parameters.

    Options decide that too: amsgrad adds a tensor, momentum another.
    """
    shapes = Counter(tuple(parameter.shape) for parameter in state.parameters.values())
    ours: Counter[_Kept] = Counter()
    for shape, count in shapes.items():
        for entries in after_a_step(settings, shape, device).state_dict()["state"].values():
            ours[_kept(entries)] += count
    theirs = Counter(map(_kept, state.optimizer["state"].values()))
    return theirs <= ours


def rebase_state(
    state: TrainingState, settings: TrainingSettings, optimizer: Optimizer, schedule: Schedule
) -> TrainingState:
    """`state` with the options of `optimizer` and the learning rate of `schedule`, both as they were built for this run by `settings`.

    Parameters, step, and what the optimizer has learnt (moments, and a step size that it finds by itself) stay what they were. A run
    without an average hands on its parameters as one. Loss scaling begins anew. An optimizer's state that is there must fit
    (`optimizer_fits`).
    """
    schedule.last_epoch = state.step
    rates = schedule.get_last_lr()
    own = optimizer.state_dict()
    taken = state.optimizer if state.optimizer.get("state") else own
    groups = [
        {**ours, "lr": _like(ours["lr"], rate)} for ours, rate in zip(own["param_groups"], rates, strict=True)
    ]
    if taken is not own:
        # some options are settled by the first step, which will not come again
        first = optimizer.param_groups[0]["params"][0]
        settled = after_a_step(settings, tuple(first.shape), first.device).param_groups[0]
        learnt = OPTIMIZERS[settings.optimizer].learnt
        for group, theirs in zip(groups, taken["param_groups"], strict=True):
            group |= {name: value for name, value in settled.items() if name not in _OWN_IN_EACH_GROUP}
            group |= {name: theirs[name] for name in learnt if name in theirs}
    return replace(
        state,
        optimizer={"state": taken["state"], "param_groups": groups},
        schedule={**schedule.state_dict(), "last_epoch": state.step, "_step_count": state.step + 1},
        scaler=None,
        average=state.average or state.parameters,
    )


def _kept(entries: Mapping[str, Any]) -> _Kept:
    kept: set[tuple[str, tuple[int, ...] | bool]] = set()
    for name, value in entries.items():
        if isinstance(value, Mapping):  # bitsandbytes nests what belongs to its state in few bits
            kept |= {(f"{name}.{inner}", shape) for inner, shape in _kept(value)}
        else:
            kept.add((name, tuple(value.shape) if isinstance(value, Tensor) else value is not None))
    return frozenset(kept)


def _like(old: Any, rate: float | Tensor) -> Any:
    return torch.full_like(old, float(rate)) if isinstance(old, Tensor) else float(rate)
