"""Invalid combinations of optimizer, learning-rate schedule, EMA and precision."""

from collections.abc import Iterator
from importlib.util import find_spec

from sdxl_pipeline.config.optimizer_registry import INSTALL, OPTIMIZERS, read_options
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding


def check_optimization(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of optimizer, schedule, EMA and precision."""
    yield from _check_schedule(training)
    spec = OPTIMIZERS[training.optimizer]
    if find_spec(spec.package) is None:
        yield Finding(
            "optimizer",
            f"needs the package {spec.distribution}, which is not installed",
            f'{INSTALL}, or write "adamw"',
        )
    try:
        read_options(training.optimizer, training.optimizer_config)
    except BadValueError as error:
        yield Finding("optimizer_config", str(error), error.hint)
    if training.use_ema and training.is_schedule_free:
        yield Finding(
            "use_ema",
            f"averages weights that optimizer {training.optimizer} already averages",
            "write false, or another optimizer",
        )
    if training.optimizer == "adamw_bf16" and training.mixed_precision in ("no", "fp16"):
        yield Finding(
            "optimizer",
            f"needs bf16 weights, but mixed_precision is {training.mixed_precision}",
            'write "mixed_precision": "bf16", or "optimizer": "adamw"',
        )


def unused_optimization_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield settings that have no effect or are rarely intended."""
    if training.optimizer == "prodigy" and training.learning_rate < 0.1:
        yield (
            f"learning_rate = {training.learning_rate:g} multiplies the step size that prodigy estimates, which makes it tiny; "
            "write 1, and scale the steps with d_coef in optimizer_config"
        )
    precision = training.base_model_precision or ""
    if precision.endswith("-torchao") and training.gradient_checkpointing is False:
        yield (
            f"base_model_precision = {precision} saves no memory while gradient_checkpointing is false: torchao retains dequantized "
            "weights from the forward to the backward pass; int8-quanto and nf4-bnb do not"
        )
    if training.gradient_checkpointing_interval and training.gradient_checkpointing is False:
        yield "gradient_checkpointing_interval has no effect while gradient_checkpointing is false"
    if not training.use_ema:
        changed = [
            key for key in _EMA_KEYS if getattr(training, key) != TrainingSettings.model_fields[key].default
        ]
        if changed:
            yield f"{', '.join(changed)} has no effect while use_ema is false"
    if training.lr_scale_sqrt and not training.lr_scale:
        yield "lr_scale_sqrt has no effect without lr_scale"
    if training.gradient_precision == "fp32" and not _may_train_in_bf16(training):
        yield "gradient_precision = fp32 has no effect: the trained weights are float32, and so are their gradients"
    yield from _unused_schedule(training)


_SCHEDULES_WITH_END = ("cosine", "cosine_with_restarts", "polynomial", "sine")
"""Schedules that use `lr_end`."""

_EMA_KEYS = keys_with(TrainingSettings, lambda key: "use_ema" in key.needs)


def _may_train_in_bf16(training: TrainingSettings) -> bool:
    """Return whether trained weights may be stored in bf16, if the hardware profile uses it."""
    kahan = training.model_type == "full" and training.optimizer.startswith("optimi-")
    return training.optimizer == "adamw_bf16" or (kahan and training.mixed_precision in (None, "bf16"))


def _unused_schedule(training: TrainingSettings) -> Iterator[str]:
    """Yield settings of other learning-rate schedules than the selected one."""
    name = training.lr_scheduler
    if training.lr_end is not None and name not in _SCHEDULES_WITH_END:
        yield f"lr_end = {training.lr_end:g} has no effect with lr_scheduler {name}; {', '.join(_SCHEDULES_WITH_END)} would use it"
    if training.lr_num_cycles != 1 and name != "cosine_with_restarts":
        yield (
            f"lr_num_cycles = {training.lr_num_cycles} has no effect with lr_scheduler {name}; "
            "cosine_with_restarts would use it"
        )
    if "lr_power" in training.model_fields_set and name != "polynomial":
        yield f"lr_power = {training.lr_power:g} has no effect with lr_scheduler {name}; polynomial would use it"


def _check_schedule(training: TrainingSettings) -> Iterator[Finding]:
    name = training.lr_scheduler
    if name == "sine" and training.lr_warmup_steps == 0:
        yield Finding(
            "lr_warmup_steps",
            "is 0, but is half the period of lr_scheduler sine",
            "write the number of steps from the peak to the trough of the learning rate, for example 100",
        )
    if name in _SCHEDULES_WITH_END and (training.effective_lr_end >= training.learning_rate):
        yield Finding(
            "lr_end",
            f"must be below learning_rate ({training.learning_rate:g}), from which lr_scheduler {name} decreases",
            f"write a smaller number, for example {training.learning_rate / 100:g}",
        )
    if training.is_schedule_free and name not in ("constant", "constant_with_warmup"):
        yield Finding(
            "lr_scheduler",
            f"decays the learning rate, but optimizer {training.optimizer} averages weights instead, and needs a constant rate",
            "write constant_with_warmup, whose lr_warmup_steps the optimizer applies, or another optimizer",
        )
