"""What cannot be trained together, each with the reason."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding


def check_what_is_trained(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between `model_type` and the other keys."""
    if training.model_type == "full":
        yield from _check_full(training)
    elif training.train_text_encoder:
        yield from _check_text_encoders(training)
    if training.fsdp_enable:
        yield from _check_fsdp(training)
    if training.model_type == "lora" and training.layer_freeze_strategy is not None:
        yield Finding(
            "layer_freeze_strategy",
            "says which weights of the UNet are trained, but model_type lora trains none of them",
            'leave it out, or write "model_type": "full"',
        )


def _check_fsdp(training: TrainingSettings) -> Iterator[Finding]:
    """What goes with FSDP is what has been seen to give the same weights as training without it."""
    if training.model_type != "full":
        yield Finding(
            "fsdp_enable",
            "divides what is trained among the processes, but an adapter is so small that nothing would be gained",
            'write false, or "model_type": "full"',
        )
    if training.layer_freeze_strategy is not None:
        yield Finding(
            "layer_freeze_strategy",
            "leaves hardly anything to divide among the processes by fsdp_enable",
            'leave it out, or write "fsdp_enable": false',
        )
    if training.optimizer != "adamw":
        yield Finding(
            "optimizer",
            "has not been tried on weights that are divided among the processes by fsdp_enable",
            'write "adamw", or "fsdp_enable": false',
        )
    if training.dynamo_backend not in (None, "no"):
        yield Finding(
            "dynamo_backend",
            "has not been tried on weights that are divided among the processes by fsdp_enable",
            'write "no", or "fsdp_enable": false',
        )
    if training.mixed_precision == "fp16":
        yield Finding(
            "mixed_precision",
            "scales the loss in fp16 on each process by itself, which cannot be with weights divided by fsdp_enable",
            "write bf16 or no",
        )
    if training.use_ema:
        yield Finding(
            "use_ema",
            "would keep a whole average beside weights that fsdp_enable divides among the processes",
            'write false, or "fsdp_enable": false',
        )
    if training.scheduled_sampling_max_step_offset:
        yield Finding(
            "scheduled_sampling_max_step_offset",
            "rolls images out on one process alone, but weights divided by fsdp_enable answer only to all together",
            'write 0, or "fsdp_enable": false',
        )


def unused_for_trained_weights(training: TrainingSettings) -> Iterator[str]:
    """Settings of what is not trained."""
    if training.text_encoder_lr is not None and not training.train_text_encoder:
        yield "text_encoder_lr has no effect while train_text_encoder is false"


def _check_text_encoders(training: TrainingSettings) -> Iterator[Finding]:
    if training.lora_type == "lycoris":
        yield Finding(
            "train_text_encoder",
            "gives the text encoders a LoRA, and a file of LyCORIS holds the UNet's adapter alone",
            'write false, or "lora_type": "standard"',
        )
    for key in ("text_encoder_1_precision", "text_encoder_2_precision"):
        if getattr(training, key) not in (None, "no_change"):
            yield Finding(
                key,
                "holds a text encoder in fewer bits, which has not been tried with one that train_text_encoder adapts",
                'write no_change, or "train_text_encoder": false',
            )
    if training.optimizer == "prodigy" and training.text_encoder_lr not in (None, 0, training.learning_rate):
        yield Finding(
            "text_encoder_lr",
            f"is another than learning_rate ({training.learning_rate:g}), but optimizer prodigy finds one rate for all",
            "leave it out, or write 0",
        )


def _check_full(training: TrainingSettings) -> Iterator[Finding]:
    if training.train_text_encoder:
        yield Finding(
            "train_text_encoder",
            "gives the text encoders a LoRA, but model_type full trains the UNet itself and makes no file that could hold it",
            'write false, or "model_type": "lora"',
        )
    for key, field in AdapterSettings.model_fields.items():
        if getattr(training, key) != field.get_default(call_default_factory=True):
            yield Finding(
                key,
                "is about an adapter, but model_type full trains the UNet's own weights and makes none",
                'leave it out, or write "model_type": "lora"',
            )
    if training.base_model_precision not in (None, "no_change"):
        yield Finding(
            "base_model_precision",
            "holds the UNet in fewer bits than a gradient step needs, but model_type full trains these very weights",
            "write no_change; mixed_precision bf16 with an optimizer made for it, such as optimi-lion, takes less memory",
        )
    if training.optimizer == "adamw_bf16" and training.mixed_precision not in (None, "bf16"):
        yield Finding(
            "mixed_precision",
            "does not go with optimizer adamw_bf16 under model_type full, which holds the whole UNet in bf16",
            "write bf16, or another optimizer",
        )
