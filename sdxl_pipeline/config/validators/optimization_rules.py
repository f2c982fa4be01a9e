"""Combinations of an optimizer, a schedule, averaged weights and precisions that cannot work, each with the reason."""

from collections.abc import Iterator
from importlib.util import find_spec

from sdxl_pipeline.config.optimizer_registry import INSTALL, OPTIMIZERS, read_options
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.settings_model import BadValueError
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding


def check_optimization(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between the settings of the optimisation and their neighbours."""
    yield from _check_schedule(training)
    recipe = OPTIMIZERS[training.optimizer]
    if find_spec(recipe.package) is None:
        yield Finding(
            "optimizer",
            f"comes from {recipe.distribution}, which is not installed",
            f'{INSTALL}, or write "adamw"',
        )
    try:
        read_options(training.optimizer, training.optimizer_config)
    except BadValueError as error:
        yield Finding("optimizer_config", str(error), error.hint)
    if training.use_ema and training.is_schedule_free:
        yield Finding(
            "use_ema",
            f"averages the weights that optimizer {training.optimizer} has averaged already",
            "write false, or another optimizer",
        )
    if training.optimizer == "adamw_bf16" and training.mixed_precision in ("no", "fp16"):
        yield Finding(
            "optimizer",
            f"holds what is trained in bf16, which does not go with mixed_precision {training.mixed_precision}",
            'write "mixed_precision": "bf16", or "optimizer": "adamw"',
        )


def advise_on_optimization(training: TrainingSettings) -> Iterator[str]:
    """What works, and is rarely meant."""
    if training.optimizer == "prodigy" and training.learning_rate < 0.1:
        yield (
            f"learning_rate = {training.learning_rate:g} multiplies the step size that prodigy finds by itself, and so makes it tiny; "
            "write 1, and d_coef in optimizer_config to make its steps larger or smaller"
        )
    precision = training.base_model_precision or ""
    if precision.endswith("-torchao") and training.gradient_checkpointing is False:
        yield (
            f"base_model_precision = {precision} saves no memory while gradient_checkpointing is false: torchao keeps its weights "
            "unpacked from the forward pass to the backward one; int8-quanto and nf4-bnb do not"
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
    if training.gradient_precision == "fp32" and not _may_hold_bf16(training):
        yield "gradient_precision = fp32 has no effect: the weights that are trained are float32, and so are their gradients"
    yield from _unused_schedule(training)


_WITH_AN_END = ("cosine", "cosine_with_restarts", "polynomial", "sine")
"""Those that lead to `lr_end`."""

_EMA_KEYS = keys_with(TrainingSettings, lambda key: "use_ema" in key.needs)


def _may_hold_bf16(training: TrainingSettings) -> bool:
    """Whether weights that are trained are held in bf16, if the hardware profile has it."""
    kahan = training.model_type == "full" and training.optimizer.startswith("optimi-")
    return training.optimizer == "adamw_bf16" or (kahan and training.mixed_precision in (None, "bf16"))


def _unused_schedule(training: TrainingSettings) -> Iterator[str]:
    """Numbers of other learning-rate schedules than the one there is."""
    name = training.lr_scheduler
    if training.lr_end is not None and name not in _WITH_AN_END:
        yield f"lr_end = {training.lr_end:g} has no effect with lr_scheduler {name}; {', '.join(_WITH_AN_END)} would use it"
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
            "is 0, but lr_scheduler sine takes it for half the length of its wave",
            "write the number of steps from the learning rate's peak to its trough, for example 100",
        )
    if name in _WITH_AN_END and (training.effective_lr_end >= training.learning_rate):
        yield Finding(
            "lr_end",
            f"must be below learning_rate ({training.learning_rate:g}), from which lr_scheduler {name} descends",
            f"write a smaller number, for example {training.learning_rate / 100:g}",
        )
    if training.is_schedule_free and name not in ("constant", "constant_with_warmup"):
        yield Finding(
            "lr_scheduler",
            f"lowers the learning rate, but optimizer {training.optimizer} averages its weights in place of that, and needs it constant",
            "write constant_with_warmup, which leaves lr_warmup_steps to the optimizer, or another optimizer",
        )
