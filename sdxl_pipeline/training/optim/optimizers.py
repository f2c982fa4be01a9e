"""Optimizers, by the names of the settings, each built by the library it comes from."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sdxl_pipeline.config.optimizer_registry import INSTALL, OPTIMIZERS, OptimizerSpec, read_options
from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError


def trainable_dtype(settings: TrainingSettings) -> torch.dtype:
    """What trained parameters are held in: float32, but bf16 for the optimizer whose stochastic rounding is made for that.

    A whole UNet whose passes are in bf16 is held in it under optimi's too, whose Kahan summation keeps what a bf16 weight cannot: of
    the 8 bytes that a parameter and its gradient take in float32, that leaves 4, and half of the moments.
    """
    kahan = settings.optimizer.startswith("optimi-") and settings.mixed_precision == "bf16"
    in_bf16 = settings.optimizer == "adamw_bf16" or (settings.model_type == "full" and kahan)
    return torch.bfloat16 if in_bf16 else torch.float32


def cast_parameters(settings: TrainingSettings, parameters: Iterable[Parameter]) -> None:
    """Bring trained parameters to `trainable_dtype`, in place, and their gradients to `gradient_precision`."""
    dtype = trainable_dtype(settings)
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
        if settings.gradient_precision == "fp32" and dtype != torch.float32:
            # so that the sum over gradient accumulation loses nothing
            parameter.grad_dtype = torch.float32


def effective_learning_rate(settings: TrainingSettings, num_processes: int) -> float:
    """`learning_rate`, times the images per optimizer step under `lr_scale`, or their square root under `lr_scale_sqrt`."""
    if not settings.lr_scale:
        return settings.learning_rate
    images = settings.train_batch_size * settings.gradient_accumulation_steps * num_processes
    return settings.learning_rate * (math.sqrt(images) if settings.lr_scale_sqrt else images)


def build_optimizer(
    settings: TrainingSettings,
    parameters: Iterable[Parameter],
    num_processes: int = 1,
    text_parameters: Iterable[Parameter] = (),
) -> Optimizer:
    """The optimizer that the settings name, over `parameters`, which already lie on the device.

    `text_parameters` are those of text encoders, whose rate is `text_encoder_lr` where that is given.

    Raises UserError when the package it comes from is missing, or when `optimizer_config` has an option or a value it does not take.
    """
    if (
        settings.gradient_precision == "fp32"
        and trainable_dtype(settings) != torch.float32
        and num_processes > 1
    ):
        raise UserError(
            f"config.json: gradient_precision fp32 holds gradients wider than weights in bf16 are, which {num_processes} processes "
            'cannot average; write "unmodified"'
        )
    recipe, trainable, texts = OPTIMIZERS[settings.optimizer], list(parameters), list(text_parameters)
    kind = _load(settings.optimizer, recipe)
    try:
        options = {**recipe.defaults, **read_options(settings.optimizer, settings.optimizer_config)}
    except BadValueError as error:  # a launch that no config file was read for
        raise UserError(f"config.json: optimizer_config {error}; {error.hint}") from error
    if recipe.package == "torch" and recipe.class_name in ("Adam", "AdamW") and not options.get("foreach"):
        # one kernel for all parameters, where torch has one for the device
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in trainable)
        options.setdefault("fused", fused)
    if settings.is_schedule_free and settings.lr_scheduler != "constant":
        options["warmup_steps"] = settings.lr_warmup_steps
    try:
        rate = effective_learning_rate(settings, num_processes)
        groups: list[Any] = (
            [{"params": trainable}, _text_group(settings, texts, rate)] if texts else trainable
        )
        optimizer = kind(groups, lr=rate, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.json: optimizer_config {settings.optimizer_config!r}: {error}") from error
    if recipe.package == "torchao":
        from sdxl_pipeline.training.optim.torchao_optimizers import make_repeatable

        make_repeatable(optimizer, settings.seed)
    return optimizer


def after_a_step(
    settings: TrainingSettings, shape: Sequence[int], device: str | torch.device = "cpu"
) -> Optimizer:
    """The optimizer that the settings name after a step on one parameter of `shape`, so that it can be asked what it keeps."""
    parameter = Parameter(torch.ones(*shape, dtype=trainable_dtype(settings), device=device))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer = build_optimizer(settings, [parameter])
        if settings.is_schedule_free:
            optimizer.train()  # type: ignore[attr-defined]
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizer


def _text_group(settings: TrainingSettings, parameters: list[Parameter], rate: float) -> dict[str, Any]:
    own = settings.text_encoder_lr
    return {
        "params": parameters,
        "lr": rate if own is None else rate * own / settings.learning_rate,
    }


def current_lr(optimizer: Optimizer, scheduled: float) -> float:
    """The learning rate a step is really taken with: those that find or warm up their own say so themselves."""
    group = optimizer.param_groups[0]
    return float(group.get("scheduled_lr") or scheduled * group.get("d", 1.0))


def _load(name: str, recipe: OptimizerSpec) -> Callable[..., Optimizer]:
    try:
        module = importlib.import_module(recipe.module)
        return getattr(module, recipe.class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config.json: optimizer {name!r} comes from {recipe.distribution}, which is not installed, or not in a version that has it "
            f'({error}); {INSTALL}, or write "optimizer": "adamw"'
        ) from error
