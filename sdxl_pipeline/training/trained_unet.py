"""The UNet prepared for training: an adapter on frozen base weights, or full fine-tuning."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdxl_pipeline.models.adapters.adapter import UNET, AdapterError, add_adapter
from sdxl_pipeline.models.adapters.init_adapter import has_text_encoder_weights, load_init_adapter
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.precision import PrecisionError, dtype_from_name, quantize_model
from sdxl_pipeline.models.unet_execution import (
    AttentionKernelError,
    compile_unet,
    enable_checkpointing,
    use_attention_kernel,
)
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.optim.optimizers import trainable_dtype
from sdxl_pipeline.training.rng import derive_seed


def base_dtype(spec: TrainSpec) -> torch.dtype:
    """Return the dtype of the frozen weights: the autocast dtype, because more precision would have no effect."""
    return dtype_from_name(spec.settings.mixed_precision or "no")


def trainable_unet(
    spec: TrainSpec, encoders: Mapping[str, nn.Module] = MappingProxyType({})
) -> UNet2DConditionModel:
    """Return the base model's UNet on the CPU with a new adapter in float32; only the adapter requires gradients.

    `encoders` are text encoders with new adapters, by prefix; they are initialized from `init_lora` like the UNet if that file has weights
    for them. Raise UserError for target modules that do not exist, and for a precision whose package is missing.
    """
    settings = spec.settings
    unet: UNet2DConditionModel = load_unet(spec.base_model, base_dtype(spec))
    try:
        quantize_model(unet, settings.base_model_precision or "no_change")
        if (
            settings.lora_type == "lycoris"
            and settings.lycoris.module_dropout
            and spec.hardware.num_processes > 1
        ):
            raise AdapterError(
                "lycoris_config: module_dropout skips different layers on each process, so that gradient synchronization would deadlock. "
                "Set it to 0, or train on one device."
            )
        add_adapter(unet, settings, derive_seed(settings.seed, "adapter"))
        if settings.init_lora is not None:
            has_encoders = has_text_encoder_weights(Path(settings.init_lora))
            load_init_adapter({UNET: unet, **(encoders if has_encoders else {})}, Path(settings.init_lora))
    except (AdapterError, PrecisionError) as error:
        raise UserError(f"config.json: {error}") from error
    _configure_compute(unet, spec)
    return unet


def full_unet(spec: TrainSpec) -> UNet2DConditionModel:
    """Return the base model's UNet on the CPU in `trainable_dtype`; all weights require gradients, or only the biases (bitfit)."""
    settings = spec.settings
    unet: UNet2DConditionModel = load_unet(spec.base_model, trainable_dtype(settings))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(settings.layer_freeze_strategy is None or name.endswith(".bias"))
    _configure_compute(unet, spec)
    return unet


def _configure_compute(unet: UNet2DConditionModel, spec: TrainSpec) -> None:
    """Set the attention kernel, gradient checkpointing and compilation. Raise UserError for an unavailable kernel."""
    settings = spec.settings
    try:
        use_attention_kernel(
            unet, settings.attention_mechanism or "diffusers", torch.device(spec.hardware.device)
        )
    except AttentionKernelError as error:
        raise UserError(f"config.json: attention_mechanism: {error}") from error
    if settings.gradient_checkpointing:
        enable_checkpointing(unet, settings.gradient_checkpointing_interval)
    compile_unet(
        unet,
        settings.dynamo_backend,
        regional=settings.dynamo_use_regional_compilation,
        mode=settings.dynamo_mode,
        fullgraph=settings.dynamo_fullgraph,
        dynamic=settings.dynamo_dynamic,
    )
