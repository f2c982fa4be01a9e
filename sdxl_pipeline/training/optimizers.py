"""Optimizers and learning-rate schedules, by the names of the settings."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.program import StageError

ADAMW_DEFAULTS: Mapping[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}

# Class in torch-optimi and the options it starts from; Kahan summation keeps the low bits of parameters held in bf16.
OPTIMI: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "optimi-adamw": ("AdamW", {"betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-6}),
    "optimi-lion": ("Lion", {"betas": (0.9, 0.99), "weight_decay": 0.0, "kahan_sum": True}),
    "optimi-stableadamw": ("StableAdamW", {"betas": (0.9, 0.99), "weight_decay": 0.01, "eps": 1e-6}),
}


def build_optimizer(settings: TrainingSettings, parameters: Iterable[Parameter]) -> Optimizer:
    """The optimizer that the settings name, over `parameters`, which already lie on the device.

    Raises StageError when the package it comes from is missing, or when `optimizer_config` has an option it does not know.
    """
    trainable = list(parameters)
    if settings.optimizer == "adamw":
        # fused: one kernel for all parameters, where torch has one for the device
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in trainable)
        return _construct(torch.optim.AdamW, trainable, settings, {**ADAMW_DEFAULTS, "fused": fused})
    class_name, defaults = OPTIMI[settings.optimizer]
    try:
        optimi = importlib.import_module("optimi")
    except ModuleNotFoundError as error:
        raise StageError(
            f"config.json: optimizer {settings.optimizer!r} comes from torch-optimi, which is not installed; "
            'install the extra with `pip install \'sdxl-pipeline[optimizers]\'`, or write "optimizer": "adamw"'
        ) from error
    return _construct(getattr(optimi, class_name), trainable, settings, defaults)


def build_schedule(settings: TrainingSettings, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The learning rate over the run; step it once per optimizer step, whatever the number of processes.

    `constant` ignores the warm-up, as its name says; the others rise linearly from 0 over `lr_warmup_steps`, and `cosine` then falls
    to 0 at `total_steps`.
    """
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=total_steps,
    )


def _construct(
    kind: Callable[..., Optimizer],
    parameters: list[Parameter],
    settings: TrainingSettings,
    defaults: Mapping[str, Any],
) -> Optimizer:
    options = {**defaults, **_options(settings.optimizer_config, defaults)}
    known = set(inspect.signature(kind).parameters) - {"params", "lr"}
    if unknown := sorted(set(options) - known):
        raise StageError(
            f"config.json: optimizer_config has {', '.join(map(repr, unknown))}, which {settings.optimizer!r} does not take; "
            f"it takes beta1, beta2, {', '.join(sorted(known - {'betas'}))}"
        )
    try:
        return kind(parameters, lr=settings.learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise StageError(f"config.json: optimizer_config {settings.optimizer_config!r}: {error}") from error


def _options(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options, with `beta1` and `beta2` brought into torch's pair `betas`."""
    options = dict(config)
    betas = list(defaults["betas"])
    for place, name in enumerate(("beta1", "beta2")):
        if name in options:
            betas[place] = options.pop(name)
    return {**options, "betas": tuple(betas)}
