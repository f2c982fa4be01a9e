"""Combinations of attention kernel, compilation and precision that cannot be meant, though each value by itself could."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

_TUNING = keys_with(TrainingSettings, lambda key: "dynamo_backend" in key.needs)


def check_acceleration(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between the keys that make a training faster."""
    kernel, backend = training.attention_mechanism, training.dynamo_backend
    if kernel == "flash-attn-2" and training.mixed_precision == "no":
        yield Finding(
            "attention_mechanism",
            "computes in bf16 and fp16 only, and mixed_precision is no",
            "write mixed_precision bf16, or attention_mechanism diffusers",
        )
    if kernel == "flex" and backend != "inductor":
        yield Finding(
            "attention_mechanism",
            "is a kernel only when compiled: else it holds all attention scores in memory",
            "write dynamo_backend inductor, or attention_mechanism diffusers",
        )
    if backend != "no" and (training.base_model_precision or "no_change").endswith(("-quanto", "-bnb")):
        yield Finding(
            "dynamo_backend",
            f"has not been seen to work with the quantized weights of {training.base_model_precision}",
            "write dynamo_backend no, or base_model_precision int8-torchao",
        )
    if backend == "eager" and training.dynamo_mode not in (None, "default"):
        yield Finding(
            "dynamo_mode", "tunes the kernels of inductor, and dynamo_backend is eager", "leave it out"
        )


def unused_acceleration_settings(training: TrainingSettings) -> Iterator[str]:
    """Settings of the compilation that have no effect without it."""
    given = [key for key in _TUNING if key in training.model_fields_set and getattr(training, key)]
    if training.dynamo_backend == "no" and given:
        yield f"{', '.join(given)} has no effect while dynamo_backend is no"
