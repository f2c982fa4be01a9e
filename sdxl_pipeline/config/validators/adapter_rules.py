"""Rules on what is trained: adapter, full UNet, text encoders, and the parameters of each."""

from collections.abc import Iterator

from sdxl_pipeline.config.linked_files import EXAMPLE, check_lycoris
from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.lycoris import LycorisSettings
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


DORA_PRECISIONS = ("int8-torchao", "fp8wo-torchao", "nf4-bnb")
"""Values of `base_model_precision` for which PEFT's DoRA equals DoRA on the dequantized weights. (Quanto's tensors cannot be cast to another
dtype, which PEFT does under mixed precision.)"""

CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
"""Name suffixes of the convolutions in SDXL's UNet; quanto does not quantize the last two."""

_LYCORIS_KEYS = {
    "lora_dropout": "dropout",
    "lora_target_modules": "apply_preset.target_module",
    "use_dora": "dora_wd",
}
"""The keys of a LyCORIS configuration that replace keys of PEFT's LoRA."""

_IGNORED_BY_LYCORIS = ("lora_rank", "lora_alpha")
"""Keys of PEFT's LoRA that SimpleTuner's LyCORIS files often contain: a warning, not an error."""


def check_adapter(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of the adapter's kind and other settings."""
    if training.lora_type == "lycoris":
        yield from _check_lycoris_keys(training)
    else:
        if training.init_lokr_norm is not None:
            yield Finding(
                "init_lokr_norm",
                "applies to LoKr only, but lora_type is standard",
                'write "lora_type": "lycoris"',
            )
        yield from _check_convolutions(training)
    if training.base_model_precision not in (None, "no_change"):
        yield from _check_quantized_base(training, training.base_model_precision)


def unused_adapter_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield settings of one kind of adapter that have no effect for another kind."""
    if training.lora_type == "lycoris":
        for key in _IGNORED_BY_LYCORIS:
            if key in training.model_fields_set and getattr(training, key) is not None:
                yield f"{key} = {getattr(training, key):g} has no effect with lora_type lycoris; set it in lycoris_config"
    elif training.lycoris_config is not None:
        yield "lycoris_config has no effect with lora_type standard"


def _check_lycoris_keys(training: TrainingSettings) -> Iterator[Finding]:
    config = training.lycoris_config
    if config is None:
        yield Finding(
            "lycoris_config",
            "is missing, but lora_type lycoris needs it",
            f"write the path of a JSON file such as {EXAMPLE}",
        )
    elif isinstance(config, str):
        yield Finding(
            "lycoris_config",
            "is the path of a file, which is read at project load only",
            "write it in config.json, or the content of the file here",
        )
    for key in keys_with(AdapterSettings, lambda key: key.lora_type == "standard"):
        field, instead = AdapterSettings.model_fields[key], _LYCORIS_KEYS.get(key)
        if key not in _IGNORED_BY_LYCORIS and getattr(training, key) != field.get_default(
            call_default_factory=True
        ):
            yield Finding(
                key,
                "applies to lora_type standard only",
                f"remove it; use {instead} in lycoris_config" if instead else "remove it",
            )
    if not isinstance(config, LycorisSettings):
        return
    for finding in check_lycoris(config):
        yield Finding("lycoris_config", f"{finding.key} {finding.message}", finding.hint)
    if training.init_lokr_norm is not None:
        if training.init_lora is not None:
            yield Finding("init_lokr_norm", "and init_lora both initialize the LoKr", "remove one of the two")
        if config.algorithms != {"lokr"}:
            yield Finding("init_lokr_norm", "applies to algo lokr only", "remove it")


def _check_convolutions(training: TrainingSettings) -> Iterator[Finding]:
    """Check convolutions by the names of the targets, before any encoding; add_lora checks the layers themselves."""
    targets = [name for name in training.lora_target_modules if name.rpartition(".")[2] in CONVOLUTIONS]
    if targets and training.use_dora and training.mixed_precision not in (None, "no"):
        yield Finding(
            "use_dora",
            f"computes the norms of a convolution, such as {targets[0]}, in {training.mixed_precision}, whose rounding would change the initial output",
            "write mixed_precision no, or remove convolutions from lora_target_modules",
        )
    quantized = [name for name in targets if name.rpartition(".")[2] not in ("conv_in", "conv_out")]
    if quantized and (training.base_model_precision or "").endswith("-quanto"):
        yield Finding(
            "lora_target_modules",
            f"contains {quantized[0]}, a convolution that base_model_precision {training.base_model_precision} quantizes, for which PEFT "
            "supports no LoRA",
            "remove convolutions, or write a base_model_precision that does not quantize them, such as no_change or int8-torchao",
        )


def _check_quantized_base(training: TrainingSettings, precision: str) -> Iterator[Finding]:
    hint = "or write base_model_precision no_change"
    if training.use_dora and precision not in DORA_PRECISIONS:
        yield Finding(
            "use_dora",
            f"computes norms of the base weights at each step, but PEFT cannot dequantize those of base_model_precision {precision}",
            f"remove it, or write base_model_precision {' or '.join(DORA_PRECISIONS)}, {hint}",
        )
    config = training.lycoris_config
    if training.lora_type == "standard" or not isinstance(config, LycorisSettings):
        return
    recomputes = f"recomputes each weight at each step, but base_model_precision {precision} quantizes them"
    if config.dora_wd:
        yield Finding("lycoris_config", f"dora_wd {recomputes}", f"remove dora_wd, {hint}")
    if config.bypass_mode is False:
        yield Finding("lycoris_config", f"bypass_mode false {recomputes}", f"write bypass_mode true, {hint}")
    if training.init_lokr_norm is not None:
        yield Finding(
            "init_lokr_norm",
            f"needs the weights' standard deviations, but base_model_precision {precision} quantizes them",
            f"remove it, {hint}",
        )
