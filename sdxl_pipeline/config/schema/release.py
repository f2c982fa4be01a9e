"""Settings of the release."""

import re
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import BadValueError, SettingsModel

LoraFormat = Literal["both", "diffusers", "comfyui"]
ExportDtype = Literal["auto", "float16", "bfloat16", "float32"]

_CHECKPOINT: Final = re.compile(r"step-0*([1-9]\d*)")


class ReleaseSettings(SettingsModel):
    """Release."""

    released_checkpoint: Annotated[str, Key(Identity.SAVING, overridable=False, used_by=("evaluation",))] = (
        Field(
            "best",
            description="The checkpoint that is evaluated and published. best: the earliest one within one standard error of the lowest eval loss; "
            'last: the final weights; or a step, such as "step-500".',
        )
    )
    lora_format: Annotated[
        LoraFormat, Key(Identity.EXPORT, overridable=False, used_by=("lora", "hub_release"))
    ] = Field(
        "both",
        description="Files of the adapter: pytorch_lora_weights.safetensors for diffusers; comfyui: <project>.safetensors with kohya's keys, "
        "for ComfyUI, A1111, Forge, kohya and InvokeAI. A run always saves the diffusers file.",
    )
    lora_export_dtype: Annotated[
        ExportDtype, Key(Identity.EXPORT, overridable=False, used_by=("lora", "hub_release"))
    ] = Field(
        "auto",
        description="Data type of <project>.safetensors; auto: float16, or bfloat16 for an adapter whose values exceed the range of float16.",
    )
    metadata_include_captions: Annotated[
        bool, Key(Identity.EXPORT, overridable=False, used_by=("lora", "hub_release"))
    ] = Field(
        False,
        description="Write folder names and how often each tag of the captions occurs into the header of <project>.safetensors.",
    )
    push_to_hub: Annotated[bool, Key(Identity.REPORTING, overridable=False, used_by=("hub_release",))] = (
        Field(False, description="Upload the release to the Hugging Face Hub.")
    )
    push_checkpoints_to_hub: Annotated[bool, Key(Identity.REPORTING, overridable=False)] = Field(
        False,
        description="With push_to_hub: also upload the weights of each checkpoint during training, into the repository's folder checkpoints. They are not checked.",
    )
    hub_model_id: Annotated[
        str | None, Key(Identity.REPORTING, overridable=False, used_by=("hub_release",))
    ] = Field(
        None,
        description='Repository, "name" or "owner/name"; not set: the project\'s name.',
    )
    model_card_private: Annotated[bool, Key(Identity.REPORTING, overridable=False)] = Field(
        True, description="Create the repository as private."
    )
    model_card_note: Annotated[
        str | None, Key(Identity.REPORTING, overridable=False, used_by=("hub_release",))
    ] = Field(None, description="A note at the top of the model card.")

    @field_validator("released_checkpoint", mode="after")
    @classmethod
    def _require_checkpoint_name(cls, value: str) -> str:
        word = value.strip().lower()
        if word in ("best", "last"):
            return word
        if (match := _CHECKPOINT.fullmatch(word)) is None:
            raise BadValueError("names no checkpoint", 'write "best", "last" or a step, such as "step-500"')
        return f"step-{match[1]}"

    @field_validator("hub_model_id", mode="after")
    @classmethod
    def _require_repository_name(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(value)
        except HFValidationError as error:
            message = str(error).removesuffix(f": '{value}'.").removesuffix(".")
            raise BadValueError(
                f"is not a valid Hub repository name: {message[0].lower()}{message[1:]}",
                'write "name" or "owner/name" of letters, digits, "-", "_" and ".", such as "your-name/cat-lora"',
            ) from error
        return value
