"""Kinds of adapters and settings that do not go together, each with the reason."""

from collections.abc import Iterator

from sdxl_pipeline.config.lycoris_file import EXAMPLE, check_lycoris
from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.lycoris import LycorisSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

DORA_PRECISIONS = ("int8-torchao", "fp8wo-torchao", "nf4-bnb")
"""Of `base_model_precision`: those over which PEFT's DoRA gives what it gives over the same weights held whole. (Quanto's refuse to be cast
to another dtype, which it does to them under mixed precision.)"""

CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
"""How the names of the convolutions in SDXL's UNet end; quanto leaves the last two whole."""

_LYCORIS_KEYS = {
    "lora_dropout": "dropout",
    "lora_target_modules": "apply_preset.target_module",
    "use_dora": "dora_wd",
}
"""The keys of a LyCORIS configuration that replace keys of PEFT's LoRA."""

_IGNORED_BY_LYCORIS = ("lora_rank", "lora_alpha")
"""Keys of PEFT's LoRA that SimpleTuner's LyCORIS files often contain: a warning, not an error."""


def check_adapter(training: TrainingSettings) -> Iterator[Finding]:
    """What is wrong between the adapter's kind and the other keys."""
    if training.lora_type == "lycoris":
        yield from _check_lycoris_keys(training)
    else:
        if training.init_lokr_norm is not None:
            yield Finding(
                "init_lokr_norm", "is about a LoKr, and lora_type is standard", 'write "lora_type": "lycoris"'
            )
        yield from _check_convolutions(training)
    if training.base_model_precision not in (None, "no_change"):
        yield from _check_over_fewer_bits(training, training.base_model_precision)


def unused_adapter_settings(training: TrainingSettings) -> Iterator[str]:
    """Settings of one kind of adapter that have no effect beside another kind."""
    if training.lora_type == "lycoris":
        for key in _IGNORED_BY_LYCORIS:
            if key in training.model_fields_set and getattr(training, key) is not None:
                yield f"{key} = {getattr(training, key):g} has no effect with lora_type lycoris; lycoris_config says it"
    elif training.lycoris_config is not None:
        yield "lycoris_config has no effect with lora_type standard"


def _check_lycoris_keys(training: TrainingSettings) -> Iterator[Finding]:
    config = training.lycoris_config
    if config is None:
        yield Finding(
            "lycoris_config", "is missing, and lora_type is lycoris", f"name a JSON file that holds {EXAMPLE}"
        )
    elif isinstance(config, str):
        yield Finding(
            "lycoris_config",
            "names a file, which is read with the project, before a run is launched",
            "write it in config.json, or the content of the file here",
        )
    for key in keys_with(AdapterSettings, lambda key: key.lora_type == "standard"):
        field, instead = AdapterSettings.model_fields[key], _LYCORIS_KEYS.get(key)
        if key not in _IGNORED_BY_LYCORIS and getattr(training, key) != field.get_default(
            call_default_factory=True
        ):
            yield Finding(
                key,
                "is about lora_type standard, and would have no effect",
                f"leave it out; {instead} in lycoris_config says it" if instead else "leave it out",
            )
    if not isinstance(config, LycorisSettings):
        return
    for finding in check_lycoris(config):
        yield Finding("lycoris_config", f"{finding.key} {finding.message}", finding.hint)
    if training.init_lokr_norm is not None:
        if training.init_lora is not None:
            yield Finding(
                "init_lokr_norm", "and init_lora both say how the LoKr starts", "leave one of the two out"
            )
        if config.algorithms != {"lokr"}:
            yield Finding("init_lokr_norm", "is about algo lokr alone", "leave it out")


def _check_convolutions(training: TrainingSettings) -> Iterator[Finding]:
    """Known from the names of targets, so that nobody waits for the latents to hear of it; add_lora looks at the layers themselves."""
    targets = [name for name in training.lora_target_modules if name.rpartition(".")[2] in CONVOLUTIONS]
    if targets and training.use_dora and training.mixed_precision not in (None, "no"):
        yield Finding(
            "use_dora",
            f"takes the norms of a convolution, as {targets[0]}, in {training.mixed_precision}, in which they would not match from the start",
            "write mixed_precision no, or leave convolutions out of lora_target_modules",
        )
    held = [name for name in targets if name.rpartition(".")[2] not in ("conv_in", "conv_out")]
    if held and (training.base_model_precision or "").endswith("-quanto"):
        yield Finding(
            "lora_target_modules",
            f"names {held[0]}, a convolution that base_model_precision {training.base_model_precision} holds in fewer bits, on which PEFT "
            "makes no LoRA",
            "leave convolutions out, or write a base_model_precision that leaves them whole, as no_change or int8-torchao",
        )


def _check_over_fewer_bits(training: TrainingSettings, precision: str) -> Iterator[Finding]:
    hint = "or write base_model_precision no_change"
    if training.use_dora and precision not in DORA_PRECISIONS:
        yield Finding(
            "use_dora",
            f"takes norms of the base weights at each step, for which PEFT cannot read those of base_model_precision {precision}",
            f"leave it out, or write base_model_precision {' or '.join(DORA_PRECISIONS)}, {hint}",
        )
    config = training.lycoris_config
    if training.lora_type == "standard" or not isinstance(config, LycorisSettings):
        return
    rebuilds = (
        f"rebuilds each weight at each step, and base_model_precision {precision} holds them in fewer bits"
    )
    if config.dora_wd:
        yield Finding("lycoris_config", f"dora_wd {rebuilds}", f"leave dora_wd out, {hint}")
    if config.bypass_mode is False:
        yield Finding("lycoris_config", f"bypass_mode false {rebuilds}", f"write bypass_mode true, {hint}")
    if training.init_lokr_norm is not None:
        yield Finding(
            "init_lokr_norm",
            f"takes the weights' deviations, and base_model_precision {precision} holds them in fewer bits",
            f"leave it out, {hint}",
        )
