"""Invalid combinations of `model_type`, trained text encoders and FSDP with other settings."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding


def check_trained_weights(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of `model_type`, `train_text_encoder` and `fsdp_enable` with other settings."""
    if training.model_type == "full":
        yield from _check_full(training)
    elif training.train_text_encoder:
        yield from _check_text_encoders(training)
    if training.fsdp_enable:
        yield from _check_fsdp(training)
    if training.model_type == "lora" and training.layer_freeze_strategy is not None:
        yield Finding(
            "layer_freeze_strategy",
            "selects trained weights of the UNet, but model_type lora trains none of them",
            'remove it, or write "model_type": "full"',
        )


def _check_fsdp(training: TrainingSettings) -> Iterator[Finding]:
    """Yield settings that are not tested to give the same weights with and without FSDP."""
    if training.model_type != "full":
        yield Finding(
            "fsdp_enable",
            "shards trained weights over processes, but an adapter is too small to benefit",
            'write false, or "model_type": "full"',
        )
    if training.layer_freeze_strategy is not None:
        yield Finding(
            "layer_freeze_strategy",
            "trains too few weights to shard with fsdp_enable",
            'remove it, or write "fsdp_enable": false',
        )
    if training.optimizer != "adamw":
        yield Finding(
            "optimizer",
            "is not tested with weights sharded by fsdp_enable",
            'write "adamw", or "fsdp_enable": false',
        )
    if training.dynamo_backend not in (None, "no"):
        yield Finding(
            "dynamo_backend",
            "is not tested with weights sharded by fsdp_enable",
            'write "no", or "fsdp_enable": false',
        )
    if training.mixed_precision == "fp16":
        yield Finding(
            "mixed_precision",
            "scales the fp16 loss separately on each process, which is incompatible with weights sharded by fsdp_enable",
            "write bf16 or no",
        )
    if training.use_ema:
        yield Finding(
            "use_ema",
            "needs an unsharded average, but fsdp_enable shards the weights",
            'write false, or "fsdp_enable": false',
        )
    if training.scheduled_sampling_max_step_offset:
        yield Finding(
            "scheduled_sampling_max_step_offset",
            "runs rollouts on a single process, but weights sharded by fsdp_enable need all processes in a forward pass",
            'write 0, or "fsdp_enable": false',
        )


def unused_for_trained_weights(training: TrainingSettings) -> Iterator[str]:
    """Yield settings of weights that are not trained."""
    if training.text_encoder_lr is not None and not training.train_text_encoder:
        yield "text_encoder_lr has no effect while train_text_encoder is false"


def _check_text_encoders(training: TrainingSettings) -> Iterator[Finding]:
    if training.lora_type == "lycoris":
        yield Finding(
            "train_text_encoder",
            "trains a LoRA on the text encoders, but a LyCORIS file contains the UNet's adapter only",
            'write false, or "lora_type": "standard"',
        )
    for key in ("text_encoder_1_precision", "text_encoder_2_precision"):
        if getattr(training, key) not in (None, "no_change"):
            yield Finding(
                key,
                "quantizes a text encoder, which is not tested with train_text_encoder",
                'write no_change, or "train_text_encoder": false',
            )
    if training.optimizer == "prodigy" and training.text_encoder_lr not in (None, 0, training.learning_rate):
        yield Finding(
            "text_encoder_lr",
            f"differs from learning_rate ({training.learning_rate:g}), but optimizer prodigy estimates one rate for all parameters",
            "remove it, or write 0",
        )


def _check_full(training: TrainingSettings) -> Iterator[Finding]:
    if training.train_text_encoder:
        yield Finding(
            "train_text_encoder",
            "trains a LoRA on the text encoders, but model_type full trains the UNet itself and saves no adapter file",
            'write false, or "model_type": "lora"',
        )
    for key, field in AdapterSettings.model_fields.items():
        if getattr(training, key) != field.get_default(call_default_factory=True):
            yield Finding(
                key,
                "applies to an adapter, but model_type full trains the UNet's own weights",
                'remove it, or write "model_type": "lora"',
            )
    if training.base_model_precision not in (None, "no_change"):
        yield Finding(
            "base_model_precision",
            "quantizes the UNet, but model_type full trains its weights, which needs full precision",
            "write no_change; mixed_precision bf16 with an optimizer for bf16 weights, such as optimi-lion, needs less memory",
        )
    if training.optimizer == "adamw_bf16" and training.mixed_precision not in (None, "bf16"):
        yield Finding(
            "mixed_precision",
            "is incompatible with optimizer adamw_bf16 and model_type full, which train the UNet in bf16",
            "write bf16, or another optimizer",
        )
