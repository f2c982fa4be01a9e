"""All rules between settings, and those of hardware acceleration and evaluation."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.adapter_rules import (
    check_adapter,
    check_trained_weights,
    unused_adapter_settings,
    unused_for_trained_weights,
)
from sdxl_pipeline.config.validators.dataset_rules import Finding
from sdxl_pipeline.config.validators.objective_rules import check_objective, unused_objective_settings
from sdxl_pipeline.config.validators.optimization_rules import (
    check_optimization,
    unused_optimization_settings,
)

_COMPILE_KEYS = keys_with(TrainingSettings, lambda key: "dynamo_backend" in key.needs)
_CAPTION_SAMPLE_KEYS = keys_with(TrainingSettings, lambda key: "num_caption_samples" in key.needs)


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


def check_evaluation_settings(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of the settings of the evaluation."""
    if training.early_stopping_patience is not None and training.eval_loss_disable:
        yield Finding(
            "early_stopping_patience",
            "needs the eval loss, but eval_loss_disable is true",
            "write eval_loss_disable false, or remove early_stopping_patience",
        )
    elif training.early_stopping_patience is not None and not training.eval_loss_in_training:
        yield Finding(
            "early_stopping_patience",
            "counts eval losses during training, but none are computed",
            'write "eval_epoch_interval": 1 or eval_steps_interval beside it',
        )
    if 0 < training.num_caption_samples < training.caption_sample_seeds:
        yield Finding(
            "caption_sample_seeds",
            f"is above num_caption_samples ({training.num_caption_samples}), so no caption has all its images",
            f"write at most {training.num_caption_samples}",
        )


def unused_evaluation_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield settings of the evaluation that have no effect because what they need is off."""
    given = training.model_fields_set
    if training.early_stopping_min_delta and training.early_stopping_patience is None:
        yield "early_stopping_min_delta has no effect without early_stopping_patience"
    if training.eval_loss_disable and training.num_probe_images and "num_probe_images" in given:
        yield "num_probe_images has no effect while eval_loss_disable is true"
    sampled = [key for key in _CAPTION_SAMPLE_KEYS if key in given and getattr(training, key) is not None]
    if not training.num_caption_samples and sampled:
        yield f"{', '.join(sampled)} has no effect while num_caption_samples is 0"
    elif training.evaluation_type == "none" and training.pretrained_similarity_model_name_or_path:
        yield "pretrained_similarity_model_name_or_path has no effect while evaluation_type is none"
    if training.model_type == "full" and training.gallery_scales:
        yield "gallery_scales has no effect while model_type is full: only an adapter has a scale"


def check_training(training: TrainingSettings) -> Iterator[Finding]:
    """Yield all invalid combinations of the settings of `config.json`."""
    yield from check_trained_weights(training)
    yield from check_adapter(training)
    yield from check_optimization(training)
    yield from check_objective(training)
    yield from check_acceleration(training)
    yield from check_evaluation_settings(training)
    steps = training.max_train_steps
    if steps is not None and training.num_train_epochs is not None:
        yield Finding(
            "num_train_epochs",
            f"is set together with max_train_steps ({steps})",
            "write 0 for the one that should not set the length of the run",
        )
    if steps is not None and training.lr_warmup_steps > training.longest_warmup(steps):
        yield Finding(
            "lr_warmup_steps",
            f"is too long for max_train_steps ({steps}): learning_rate would never be reached",
            f"write at most {training.longest_warmup(steps)}",
        )
    repeated = {tracker for tracker in training.report_to if training.report_to.count(tracker) > 1}
    if repeated:
        yield Finding("report_to", f"lists {', '.join(sorted(repeated))} twice", "list each tracker once")


def unused_training_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield settings that have no effect or are rarely intended, with the reason."""
    yield from unused_for_trained_weights(training)
    yield from unused_optimization_settings(training)
    yield from unused_adapter_settings(training)
    yield from unused_objective_settings(training)
    yield from unused_acceleration_settings(training)
    yield from unused_evaluation_settings(training)
    if training.hub_model_id is not None and not training.push_to_hub:
        yield f"hub_model_id = {training.hub_model_id} has no effect while push_to_hub is false"
    if training.push_checkpoints_to_hub and not training.push_to_hub:
        yield "push_checkpoints_to_hub = true has no effect while push_to_hub is false"
    has_images = not training.validation_disable and (
        training.validation_prompt or training.user_prompt_library or training.validation_prompt_library
    )
    if training.validation_preview and not has_images:
        yield "validation_preview = true has no effect while no validation images are generated"
    if training.webhook_reporting_interval is not None and training.webhook_config is None:
        yield "webhook_reporting_interval has no effect without webhook_config"
    if training.eval_loss_disable and (training.eval_steps_interval or training.eval_epoch_interval):
        yield "eval_steps_interval and eval_epoch_interval have no effect while eval_loss_disable is true"
