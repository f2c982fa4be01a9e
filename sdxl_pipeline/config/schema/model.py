"""Settings of the model."""

from typing import Annotated, Final, Literal

from pydantic import Field

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import SettingsModel

MODEL_FLAVOURS: Final = {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0"}
"""Hub repository of each `model_flavour`."""


class ModelSettings(SettingsModel):
    """The model."""

    model_type: Literal["lora", "full"] = Field(
        "lora", description="What is trained: lora trains an adapter, full trains all weights of the UNet."
    )
    train_text_encoder: bool = Field(
        False,
        description="Also train a LoRA on both text encoders; captions are then encoded at every step, without a text cache.",
    )
    text_encoder_lr: Annotated[Annotated[float, Field(ge=0, le=10)] | None, Key(on_card=True)] = Field(
        None, description="Learning rate of the text encoders; not set: learning_rate."
    )
    layer_freeze_strategy: Literal["bitfit"] | None = Field(
        None, description="bitfit trains only the biases of the UNet; for model_type full."
    )
    model_family: Annotated[Literal["sdxl"], Key(Identity.BASE_MODEL, overridable=False)] = Field(
        "sdxl", description="This project trains Stable Diffusion XL."
    )
    model_flavour: Annotated[Literal["base-1.0"], Key(Identity.BASE_MODEL, overridable=False)] = Field(
        "base-1.0", description="Released SDXL version; base-1.0 is stabilityai/stable-diffusion-xl-base-1.0."
    )
    pretrained_model_name_or_path: Annotated[
        str | None, Key(Identity.BASE_MODEL, path="base model", overridable=False)
    ] = Field(
        None,
        description="Hub id, diffusers folder, .safetensors checkpoint or bundled:tiny-sdxl; replaces model_flavour.",
    )
    pretrained_vae_model_name_or_path: Annotated[
        str | None, Key(Identity.BASE_MODEL, path="base model", overridable=False)
    ] = Field(None, description="Hub id or folder of another VAE.")
    revision: Annotated[str | None, Key(Identity.BASE_MODEL, overridable=False)] = Field(
        None, description="Branch, tag or commit of the base model on the Hub."
    )
    prediction_type: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, Key(on_card=True, used_by=("run_evaluation",))
    ] = Field(None, description="What the UNet predicts; not set: as in the base model's scheduler config.")
