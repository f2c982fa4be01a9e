"""Combinations of an optimizer, a schedule, averaged weights and precisions that cannot work, each with the reason."""

from collections.abc import Iterator

from sdxl_pipeline.project.dataset_checks import Finding
from sdxl_pipeline.project.sections.ema import EmaSettings
from sdxl_pipeline.project.training import TrainingSettings


def check_optimisation(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between the settings of the optimisation and their neighbours."""
    yield from _check_schedule(training)
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


def advise_on_optimisation(training: TrainingSettings) -> Iterator[str]:
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
        changed = [key for key in _EMA_KEYS if getattr(training, key) != _EMA_KEYS[key].default]
        if changed:
            yield f"{', '.join(changed)} has no effect while use_ema is false"
    if training.lr_scale_sqrt and not training.lr_scale:
        yield "lr_scale_sqrt has no effect without lr_scale"


_EMA_KEYS = {key: field for key, field in EmaSettings.model_fields.items() if key != "use_ema"}


def _check_schedule(training: TrainingSettings) -> Iterator[Finding]:
    name = training.lr_scheduler
    if name == "sine" and training.lr_warmup_steps == 0:
        yield Finding(
            "lr_warmup_steps",
            "is 0, but lr_scheduler sine takes it for half the length of its wave",
            "write the number of steps from the learning rate's peak to its trough, for example 100",
        )
    if name in ("cosine", "cosine_with_restarts", "polynomial", "sine") and (
        training.effective_lr_end >= training.learning_rate
    ):
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
