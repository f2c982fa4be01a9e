"""Settings that trade time for memory: precision, offload, checkpointing, attention and sharding."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from sdxl_pipeline.config.hardware_profiles import AttentionMechanism, BaseModelPrecision
from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import BadValueError, Count, SettingsModel, none_for_zero


class ShardingSettings(SettingsModel):
    """Sharding of a full UNet over processes."""

    fsdp_enable: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        False,
        description="Shard weights, gradients and optimizer state of model_type full over the processes, instead of a replica on each.",
    )
    fsdp_version: Annotated[Literal[2], Key(Identity.COMPUTE)] = Field(
        2, description="PyTorch's FSDP2 (fully_shard)."
    )
    fsdp_reshard_after_forward: Annotated[bool, Key(Identity.COMPUTE)] = Field(
        True,
        description="Reshard a block's weights after its forward pass and gather them again for the backward pass: less memory, more communication.",
    )

    @field_validator("fsdp_version", mode="before")
    @classmethod
    def _parse_version(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value


_INFERENCE_ONLY = (
    "also quantizes activations, which torchao supports for inference only: it has no backward pass"
)
_KERNELS = "needs GPU-specific kernels (mslk) without a verified backward pass"
_REFUSED_PRECISIONS = {
    "int8dq-torchao": _INFERENCE_ONLY,
    "int8dq-int4-torchao": _INFERENCE_ONLY,
    "fp8-torchao": _INFERENCE_ONLY,
    "int4-torchao": _KERNELS,
    "fp8-int4-torchao": _KERNELS,
    "fp8-native": "is SimpleTuner's own format",
    "fp8-transformerengine": "needs NVIDIA's Transformer Engine, which this project does not use",
}

_FLASH_ALIASES = ("flash", "flash-attn", "flash-attention-2")
_NO_BACKWARD = "has a forward pass only, so it cannot train"
_REFUSED_KERNELS = {
    "flash-attn-3": f"as called by diffusers {_NO_BACKWARD}",
    "flash-attention-3": f"as called by diffusers {_NO_BACKWARD}",
    "sla": "attends to part of the image only, which changes the model",
}
_PYTORCH_KERNELS = ("native-", "cudnn")
_SUPPORTED_KERNELS = "one of " + ", ".join(f'"{name}"' for name in get_args(AttentionMechanism))
_CUDA_GRAPHS = (
    "replays CUDA graphs, which need fixed tensor addresses; buckets and validation images change them"
)


class MemorySettings(SettingsModel):
    """Speed and memory; a hardware profile may set these."""

    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, Key(profile=True, on_card=True, used_by=("run_evaluation",))
    ] = Field(None, description="Autocast precision of the UNet.")
    gradient_checkpointing: Annotated[bool | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None, description="Recompute activations in the backward pass: less memory, slower."
    )
    attention_mechanism: Annotated[AttentionMechanism | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None,
        description="Attention kernel. diffusers: PyTorch's scaled_dot_product_attention; xformers and flash-attn-2 need their packages, flex needs dynamo_backend inductor, and all three a GPU.",
    )
    dynamo_backend: Annotated[Literal["no", "inductor", "eager"], Key(Identity.COMPUTE)] = Field(
        "no",
        description="torch.compile backend of the UNet: faster steps after compiling for minutes. eager only traces, to find graph breaks.",
    )
    dynamo_mode: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"] | None,
        Key(Identity.COMPUTE, needs=("dynamo_backend",)),
    ] = Field(None, description="Autotuning mode of inductor; not set: default.")
    dynamo_fullgraph: Annotated[bool, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = Field(
        False, description="Fail at a graph break."
    )
    dynamo_dynamic: Annotated[bool | None, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = Field(
        None,
        description="Compile for dynamic shapes (true) or each shape (false). Not set: dynamic from the second shape on.",
    )
    dynamo_use_regional_compilation: Annotated[bool, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = (
        Field(
            True,
            description="Compile a transformer block once and reuse it for all: a fraction of the compile time.",
        )
    )
    gradient_checkpointing_interval: Annotated[Count | None, Key(Identity.COMPUTE)] = Field(
        None,
        description="With gradient_checkpointing: recompute every n-th layer only; more memory, faster. 0 or 1: every layer.",
    )
    base_model_precision: Annotated[BaseModelPrecision | None, Key(profile=True, on_card=True)] = Field(
        None,
        description="Quantization of the frozen UNet's weights; all but no_change need the extra `quantization`.",
    )
    text_encoder_1_precision: Annotated[BaseModelPrecision | None, Key(profile=True)] = Field(
        None, description="Quantization of the first text encoder while captions are encoded."
    )
    text_encoder_2_precision: Annotated[BaseModelPrecision | None, Key(profile=True)] = Field(
        None, description="Quantization of the second text encoder while captions are encoded."
    )
    vae_dtype: Annotated[
        Literal["bf16", "fp32"] | None, Key(Identity.LATENT_KEYS, profile=True, used_by=("run_evaluation",))
    ] = Field(None, description="Precision of VAE encoding.")
    vae_batch_size: Annotated[Count | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None, description="Images per VAE forward pass."
    )
    text_encoder_batch_size: Annotated[Count | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None, description="Captions per text-encoder forward pass."
    )

    @field_validator("gradient_checkpointing_interval", mode="before")
    @classmethod
    def _zero_interval_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator(
        "base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision", mode="before"
    )
    @classmethod
    def _require_trainable_precision(cls, value: Any) -> Any:
        if isinstance(value, str) and (reason := _REFUSED_PRECISIONS.get(value)):
            raise BadValueError(
                f"{value} {reason}", "write int8-quanto, int8-torchao, fp8wo-torchao or nf4-bnb"
            )
        return value

    @field_validator("attention_mechanism", mode="before")
    @classmethod
    def _require_trainable_kernel(cls, value: Any) -> Any:
        reason = _REFUSED_KERNELS.get(str(value))
        if str(value).startswith("sageattention"):
            reason = _NO_BACKWARD
        if value in _FLASH_ALIASES:
            return "flash-attn-2"
        if isinstance(value, str) and value.startswith(_PYTORCH_KERNELS):
            raise BadValueError(
                f"{value} is a kernel that PyTorch selects by itself",
                f'write {_SUPPORTED_KERNELS}; "diffusers" lets PyTorch choose',
            )
        known = (*get_args(AttentionMechanism), "", "none", "null")
        if isinstance(value, str) and value.strip().lower() not in known:
            raise BadValueError(
                f"{value} {reason or 'is not a supported attention kernel'}", f"write {_SUPPORTED_KERNELS}"
            )
        return value

    @field_validator("dynamo_mode", mode="before")
    @classmethod
    def _refuse_cuda_graphs(cls, value: Any) -> Any:
        if value in ("reduce-overhead", "max-autotune"):
            raise BadValueError(f"{value} {_CUDA_GRAPHS}", "write max-autotune-no-cudagraphs or default")
        return value

    @field_validator("vae_dtype", mode="before")
    @classmethod
    def _default_vae_dtype(cls, value: Any) -> Any:
        return None if value == "default" else value
