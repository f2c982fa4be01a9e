"""Speed and memory; a hardware profile may set these."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from sdxl_pipeline.config.hardware_profiles import AttentionMechanism, BaseModelPrecision
from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import BadValueError, Count, SettingsModel, none_for_zero

_INFERENCE = (
    "takes the activations in few bits too, as torchao does for inference: no gradient comes back through it"
)
_KERNELS = "needs kernels for one kind of GPU (mslk), through which no gradient has been seen to come back"
_REFUSED_PRECISIONS = {
    "int8dq-torchao": _INFERENCE,
    "int8dq-int4-torchao": _INFERENCE,
    "fp8-torchao": _INFERENCE,
    "int4-torchao": _KERNELS,
    "fp8-int4-torchao": _KERNELS,
    "fp8-native": "is SimpleTuner's own format",
    "fp8-transformerengine": "needs NVIDIA's Transformer Engine, which this project does not use",
}

_FLASH = ("flash", "flash-attn", "flash-attention-2")
_NO_GRADIENT = "has a forward pass only: no gradient comes back through it"
_REFUSED_KERNELS = {
    "flash-attn-3": f"as diffusers calls it {_NO_GRADIENT}",
    "flash-attention-3": f"as diffusers calls it {_NO_GRADIENT}",
    "sla": "attends to part of the image, which changes the model",
}
_OF_PYTORCH = ("native-", "cudnn")
_KERNELS_HERE = "one of " + ", ".join(f'"{name}"' for name in get_args(AttentionMechanism))
_CUDA_GRAPHS = (
    "replays CUDA graphs, which expect every tensor where it was, and buckets and validation images move them"
)


class MemorySettings(SettingsModel):
    """Speed and memory; a hardware profile may set these."""

    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, Key(profile=True, on_card=True, used_by=("run_evaluation",))
    ] = Field(None, description="Precision of the UNet's passes.")
    gradient_checkpointing: Annotated[bool | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None, description="Recompute activations in the backward pass: less memory, slower."
    )
    attention_mechanism: Annotated[AttentionMechanism | None, Key(Identity.COMPUTE, profile=True)] = Field(
        None,
        description="Attention kernel. diffusers: PyTorch's scaled_dot_product_attention; xformers and flash-attn-2 need their packages, flex needs dynamo_backend inductor, and all three a GPU.",
    )
    dynamo_backend: Annotated[Literal["no", "inductor", "eager"], Key(Identity.COMPUTE)] = Field(
        "no",
        description="torch.compile for the UNet: faster steps after a first one that takes minutes. eager only traces, to find what breaks.",
    )
    dynamo_mode: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"] | None,
        Key(Identity.COMPUTE, needs=("dynamo_backend",)),
    ] = Field(None, description="How long inductor searches for the fastest kernels; not set: default.")
    dynamo_fullgraph: Annotated[bool, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = Field(
        False, description="Fail where torch.compile would leave a gap."
    )
    dynamo_dynamic: Annotated[bool | None, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = Field(
        None,
        description="Compile for any size at once (true) or for each (false). Not set: for any from the second size on.",
    )
    dynamo_use_regional_compilation: Annotated[bool, Key(Identity.COMPUTE, needs=("dynamo_backend",))] = (
        Field(
            True,
            description="Compile the transformer blocks alone, one for all: the first step comes after a fraction of the time.",
        )
    )
    gradient_checkpointing_interval: Annotated[Count | None, Key(Identity.COMPUTE)] = Field(
        None,
        description="With gradient_checkpointing: recompute only every n-th layer; more memory, faster. 0 or 1: every layer.",
    )
    base_model_precision: Annotated[BaseModelPrecision | None, Key(profile=True, on_card=True)] = Field(
        None,
        description="Weights of the frozen UNet in fewer bits; all but no_change need the extra `quantization`.",
    )
    text_encoder_1_precision: Annotated[BaseModelPrecision | None, Key(profile=True)] = Field(
        None, description="The same of the first text encoder, while captions are embedded."
    )
    text_encoder_2_precision: Annotated[BaseModelPrecision | None, Key(profile=True)] = Field(
        None, description="The same of the second text encoder."
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
    def _no_interval(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator(
        "base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision", mode="before"
    )
    @classmethod
    def _precision_can_be_trained_through(cls, value: Any) -> Any:
        if isinstance(value, str) and (reason := _REFUSED_PRECISIONS.get(value)):
            raise BadValueError(
                f"{value} {reason}", "write int8-quanto, int8-torchao, fp8wo-torchao or nf4-bnb"
            )
        return value

    @field_validator("attention_mechanism", mode="before")
    @classmethod
    def _kernel_can_be_trained_through(cls, value: Any) -> Any:
        reason = _REFUSED_KERNELS.get(str(value))
        if str(value).startswith("sageattention"):
            reason = _NO_GRADIENT
        if value in _FLASH:
            return "flash-attn-2"
        if isinstance(value, str) and value.startswith(_OF_PYTORCH):
            raise BadValueError(
                f"{value} is one of the kernels that PyTorch chooses from by itself",
                f'write {_KERNELS_HERE}; "diffusers" leaves the choice to PyTorch',
            )
        known = (*get_args(AttentionMechanism), "", "none", "null")
        if isinstance(value, str) and value.strip().lower() not in known:
            raise BadValueError(
                f"{value} {reason or 'is no kernel that trains here'}", f"write {_KERNELS_HERE}"
            )
        return value

    @field_validator("dynamo_mode", mode="before")
    @classmethod
    def _mode_leaves_tensors_free(cls, value: Any) -> Any:
        if value in ("reduce-overhead", "max-autotune"):
            raise BadValueError(f"{value} {_CUDA_GRAPHS}", "write max-autotune-no-cudagraphs or default")
        return value

    @field_validator("vae_dtype", mode="before")
    @classmethod
    def _default_vae_dtype(cls, value: Any) -> Any:
        return None if value == "default" else value
