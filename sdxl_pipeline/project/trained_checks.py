"""What cannot be trained together, each with the reason."""

from collections.abc import Iterator

from sdxl_pipeline.project.dataset_checks import Finding
from sdxl_pipeline.project.sections.adapter import AdapterSettings
from sdxl_pipeline.project.training import TrainingSettings


def check_what_is_trained(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between `model_type` and the other keys."""
    if training.model_type == "full":
        yield from _check_full(training)
    elif training.layer_freeze_strategy is not None:
        yield Finding(
            "layer_freeze_strategy",
            "says which weights of the UNet are trained, but model_type lora trains none of them",
            'leave it out, or write "model_type": "full"',
        )


def _check_full(training: TrainingSettings) -> Iterator[Finding]:
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
