"""The state of another run as the state that this one goes on from, under its own settings."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sdxl_pipeline.training.checkpoints import TrainingState
from sdxl_pipeline.training.schedules import Schedule


def under_own_settings(state: TrainingState, optimizer: Optimizer, schedule: Schedule) -> TrainingState:
    """`state` with the options of `optimizer` and the learning rate of `schedule`, both as they were built for this run.

    Parameters, step, and what the optimizer has learnt (moments, and a step size that it finds by itself) stay what they were. A run
    without an average hands on its parameters as one. Loss scaling begins anew.
    """
    schedule.last_epoch = state.step
    rates = schedule.get_last_lr()
    own = optimizer.state_dict()
    taken = state.optimizer or own
    options = {*inspect.signature(type(optimizer).__init__).parameters, "initial_lr", "params"}
    groups = [
        {
            **theirs,
            **{key: value for key, value in ours.items() if key in options},
            "lr": _like(ours["lr"], rate),
        }
        for ours, theirs, rate in zip(own["param_groups"], taken["param_groups"], rates, strict=True)
    ]
    return replace(
        state,
        optimizer={"state": taken["state"], "param_groups": groups},
        schedule={**schedule.state_dict(), "last_epoch": state.step, "_step_count": state.step + 1},
        scaler=None,
        average=state.average or state.parameters,
    )


def _like(old: Any, rate: float | Tensor) -> Any:
    return torch.full_like(old, float(rate)) if isinstance(old, Tensor) else float(rate)
