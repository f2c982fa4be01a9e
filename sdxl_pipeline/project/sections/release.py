"""Release."""

from typing import Literal

from pydantic import Field

from sdxl_pipeline.project.settings_model import SettingsModel

LoraFormat = Literal["both", "diffusers", "comfyui"]
ExportDtype = Literal["auto", "float16", "bfloat16", "float32"]


class ReleaseSettings(SettingsModel):
    """Release."""

    lora_format: LoraFormat = Field(
        "both",
        description="Files of the adapter: pytorch_lora_weights.safetensors for diffusers; comfyui: <project>.safetensors with kohya's keys, "
        "for ComfyUI, A1111, Forge, kohya and InvokeAI. A run keeps diffusers' file in any case.",
    )
    lora_export_dtype: ExportDtype = Field(
        "auto",
        description="Data type of <project>.safetensors; auto: float16, or bfloat16 for an adapter whose values float16 cannot hold.",
    )
    metadata_include_captions: bool = Field(
        False,
        description="Write folder names and how often each tag of the captions occurs into the header of <project>.safetensors.",
    )
    push_to_hub: bool = Field(False, description="Upload the release to the Hugging Face Hub.")
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$",
        description='Repository, "name" or "owner/name"; not set: the project\'s name.',
    )
    model_card_private: bool = Field(True, description="Create the repository as private.")
    model_card_note: str | None = Field(None, description="A note at the top of the model card.")
