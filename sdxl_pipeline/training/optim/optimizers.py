"""Optimizers, by their names in the settings, each from its own library."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from sdxl_pipeline.config.optimizer_registry import INSTALL, OPTIMIZERS, OptimizerSpec, read_options
from sdxl_pipeline.config.schema.optimization import OptimizationSettings
from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.runtime.stage_runner import UserError


def trainable_dtype(optimizer: str, mixed_precision: str | None, full: bool) -> torch.dtype:
    """Return the dtype of trained parameters: float32, or bf16 for optimizers that compensate its rounding. `full` is model_type full.

    adamw_bf16 rounds stochastically. A full UNet trained with mixed_precision bf16 is also stored in bf16 under optimi's optimizers, whose
    Kahan summation keeps what a bf16 weight cannot: of the 8 bytes of a float32 parameter and its gradient that leaves 4, and half of the
    moments.
    """
    kahan = optimizer.startswith("optimi-") and mixed_precision == "bf16"
    in_bf16 = optimizer == "adamw_bf16" or (full and kahan)
    return torch.bfloat16 if in_bf16 else torch.float32


def cast_parameters(parameters: Iterable[Parameter], dtype: torch.dtype, gradient_precision: str) -> None:
    """Cast trained parameters to `dtype`, see `trainable_dtype`, in place, and set the dtype of their gradients by `gradient_precision`."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
        if gradient_precision == "fp32" and dtype != torch.float32:
            # no precision is lost in gradient accumulation
            parameter.grad_dtype = torch.float32


def effective_learning_rate(settings: OptimizationSettings, num_processes: int) -> float:
    """Return `learning_rate`, times the images per optimizer step under `lr_scale`, or their square root under `lr_scale_sqrt`."""
    if not settings.lr_scale:
        return settings.learning_rate
    images = settings.train_batch_size * settings.gradient_accumulation_steps * num_processes
    return settings.learning_rate * (math.sqrt(images) if settings.lr_scale_sqrt else images)


def build_optimizer(
    settings: OptimizationSettings,
    parameters: Iterable[Parameter],
    num_processes: int = 1,
    text_parameters: Iterable[Parameter] = (),
    text_encoder_lr: float | None = None,
) -> Optimizer:
    """Return the configured optimizer over `parameters`, which are already on the device and in their final dtype.

    `text_parameters` are those of text encoders, with the learning rate `text_encoder_lr` if it is given.

    Raises UserError if the optimizer's package is missing, or if `optimizer_config` has an option or a value that it does not accept.
    """
    trainable, text_encoder_parameters = list(parameters), list(text_parameters)
    in_float32 = all(parameter.dtype == torch.float32 for parameter in trainable)
    if settings.gradient_precision == "fp32" and not in_float32 and num_processes > 1:
        raise UserError(
            f"config.json: gradient_precision fp32 makes the gradients of bf16 weights float32, which {num_processes} processes "
            'cannot average; write "unmodified"'
        )
    spec = OPTIMIZERS[settings.optimizer]
    optimizer_class = _load(settings.optimizer, spec)
    try:
        options = {**spec.defaults, **read_options(settings.optimizer, settings.optimizer_config)}
    except BadValueError as error:  # settings that were not loaded from a config file
        raise UserError(f"config.json: optimizer_config {error}; {error.hint}") from error
    if spec.package == "torch" and spec.class_name in ("Adam", "AdamW") and not options.get("foreach"):
        # one kernel for all parameters, on devices for which torch has one
        fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in trainable)
        options.setdefault("fused", fused)
    if settings.is_schedule_free and settings.lr_scheduler != "constant":
        options["warmup_steps"] = settings.lr_warmup_steps
    try:
        lr = effective_learning_rate(settings, num_processes)
        groups: list[Any] = trainable
        if text_encoder_parameters:
            text_lr = lr if text_encoder_lr is None else lr * text_encoder_lr / settings.learning_rate
            groups = [{"params": trainable}, {"params": text_encoder_parameters, "lr": text_lr}]
        optimizer = optimizer_class(groups, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.json: optimizer_config {settings.optimizer_config!r}: {error}") from error
    if spec.package == "torchao":
        from sdxl_pipeline.training.optim.torchao_optimizers import make_deterministic

        make_deterministic(optimizer, settings.seed)
    return optimizer


def optimizer_after_one_step(
    settings: OptimizationSettings,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Optimizer:
    """Return the configured optimizer after one step on one parameter of `shape` and `dtype`, to inspect its state."""
    parameter = Parameter(torch.ones(*shape, dtype=dtype, device=device))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer = build_optimizer(settings, [parameter])
        if settings.is_schedule_free:
            optimizer.train()  # type: ignore[attr-defined]
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return optimizer


def current_lr(optimizer: Optimizer, scheduled: float) -> float:
    """Return the learning rate of the latest step; optimizers that adapt or warm up their own report it in their parameter group."""
    group = optimizer.param_groups[0]
    return float(group.get("scheduled_lr") or scheduled * group.get("d", 1.0))


def _load(name: str, spec: OptimizerSpec) -> Callable[..., Optimizer]:
    try:
        module = importlib.import_module(spec.module)
        return getattr(module, spec.class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config.json: optimizer {name!r} comes from {spec.distribution}, which is not installed, or not in a version that contains it "
            f'({error}); {INSTALL}, or write "optimizer": "adamw"'
        ) from error
