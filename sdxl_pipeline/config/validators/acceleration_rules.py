"""Invalid combinations of attention kernel, compilation and precision."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

_COMPILE_KEYS = keys_with(TrainingSettings, lambda key: "dynamo_backend" in key.needs)


def check_acceleration(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of the acceleration settings."""
    kernel, backend = training.attention_mechanism, training.dynamo_backend
    if kernel == "flash-attn-2" and training.mixed_precision == "no":
        yield Finding(
            "attention_mechanism",
            "supports bf16 and fp16 only, but mixed_precision is no",
            "write mixed_precision bf16, or attention_mechanism diffusers",
        )
    if kernel == "flex" and backend != "inductor":
        yield Finding(
            "attention_mechanism",
            "needs compilation: otherwise it materializes all attention scores in memory",
            "write dynamo_backend inductor, or attention_mechanism diffusers",
        )
    if backend != "no" and (training.base_model_precision or "no_change").endswith(("-quanto", "-bnb")):
        yield Finding(
            "dynamo_backend",
            f"is not tested with the quantized weights of {training.base_model_precision}",
            "write dynamo_backend no, or base_model_precision int8-torchao",
        )
    if backend == "eager" and training.dynamo_mode not in (None, "default"):
        yield Finding(
            "dynamo_mode", "tunes the kernels of inductor, but dynamo_backend is eager", "remove it"
        )


def unused_acceleration_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield compilation settings that have no effect because compilation is off."""
    given = [key for key in _COMPILE_KEYS if key in training.model_fields_set and getattr(training, key)]
    if training.dynamo_backend == "no" and given:
        yield f"{', '.join(given)} has no effect while dynamo_backend is no"
