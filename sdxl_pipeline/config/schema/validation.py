"""Settings of validation images."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import (
    BadValueError,
    Count,
    SettingsModel,
    Share,
    none_for_zero,
)

_LONGEST_EDGE = 8192

Sampler = Literal["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"]


class ValidationSettings(SettingsModel):
    """Validation images during training."""

    validation_disable: Annotated[bool, Key(Identity.VALIDATION)] = Field(
        False, description="Generate no images during training."
    )
    validation_prompt: Annotated[str | None, Key(Identity.VALIDATION, overridable=False)] = Field(
        None, description="Prompt of the images during training and in the evaluation."
    )
    user_prompt_library: Annotated[str | None, Key(Identity.VALIDATION, path="local", overridable=False)] = (
        Field(
            None,
            description='JSON file of more prompts: {"name": "prompt"} or {"name": {"prompt": ..., "negative_prompt": ...}}.',
        )
    )
    validation_prompt_library: Annotated[bool, Key(Identity.VALIDATION, overridable=False)] = Field(
        False, description="Also use the bundled prompt library."
    )
    validation_disable_unconditional: Annotated[bool, Key(Identity.VALIDATION)] = Field(
        True, description="Do not generate the image of the empty prompt; false generates it during training."
    )
    validation_negative_prompt: Annotated[str, Key(Identity.VALIDATION, overridable=False)] = Field(
        "blurry, cropped, ugly",
        description='Negative prompt of the validation images; "" is none, for which SDXL\'s pipeline uses zero embeddings.',
    )
    validation_resolution: Annotated[str, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        "1024x1024",
        description='Sizes of the validation images: "1024x1024,1280x768" (WxH), one edge, or megapixels when under 128.',
    )
    validation_guidance: Annotated[float, Field(ge=0), Key(Identity.VALIDATION, used_by=("evaluation",))] = (
        Field(7.5, description="Classifier-free guidance scale.")
    )
    validation_guidance_rescale: Annotated[Share, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        0.0, description="Guidance rescale factor (Lin et al. 2023); 0 is off."
    )
    validation_num_inference_steps: Annotated[Count, Key(Identity.VALIDATION, used_by=("evaluation",))] = (
        Field(30, description="Sampler steps per image.")
    )
    validation_noise_scheduler: Annotated[
        Sampler | None, Key(Identity.VALIDATION, used_by=("evaluation",))
    ] = Field(None, description="Sampler of the images; not set: the base model's.")
    inference_scheduler_timestep_spacing: Annotated[
        Literal["leading", "linspace", "trailing"] | None, Key(Identity.VALIDATION, used_by=("evaluation",))
    ] = Field(
        None,
        description="Timestep spacing of the sampler; not set: the base model's (SDXL's is leading; SimpleTuner's default is trailing).",
    )
    validation_seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**32)] | None, Key(Identity.VALIDATION, used_by=("evaluation",))
    ] = Field(None, description="Seed of the validation images; not set: `seed`.")
    validation_step_interval: Annotated[int, Field(ge=0), Key(Identity.VALIDATION)] = Field(
        100, description="Steps between validation images; 0 generates them only at the end."
    )
    validation_epoch_interval: Annotated[Count | None, Key(Identity.VALIDATION)] = Field(
        None,
        description="Epochs between validation images, in addition to validation_step_interval; not set or 0: none by epochs.",
    )
    validation_on_startup: Annotated[bool | None, Key(Identity.VALIDATION)] = Field(
        None,
        description="Generate images before the first step; not set: if validation_step_interval is not 0.",
    )
    num_validation_images: Annotated[Count, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        1, description="Images per prompt, with successive seeds."
    )
    validation_randomize: Annotated[bool, Key(Identity.VALIDATION)] = Field(
        False, description="Use different seeds at each validation instead of fixed ones."
    )
    validation_preview: Annotated[bool, Key(Identity.VALIDATION)] = Field(
        False, description="Log intermediate images of the sampler, decoded by a tiny autoencoder."
    )
    validation_preview_steps: Annotated[Count, Key(Identity.VALIDATION)] = Field(
        1, description="Sampler steps between previews."
    )
    validation_preview_model_name_or_path: Annotated[
        str | None, Key(Identity.VALIDATION, path="name or path")
    ] = Field(
        None,
        min_length=1,
        description="Tiny autoencoder of the previews: Hub id, local folder or bundled:tiny-taesd; not set: madebyollin/taesdxl, "
        "and the bundled one for the bundled model.",
    )

    @property
    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return (height, width) in pixels of each entry of `validation_resolution`."""
        return parse_sizes(self.validation_resolution)

    @field_validator("validation_epoch_interval", mode="before")
    @classmethod
    def _zero_validation_interval_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("validation_resolution", mode="before")
    @classmethod
    def _check_validation_resolution(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            parse_sizes(value)
        return value


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Return (height, width) in pixels of each part of `text`, such as "1024x1024,1280x768" (WxH), "768" (an edge) or "1.0" (megapixels).

    A bare number under 128 is megapixels of a square whose edge is rounded to a multiple of 64. Raise BadValueError for anything else,
    and for an edge that is not a multiple of 8, which the VAE cannot decode to.
    """
    sizes = tuple(_parse_size(part.strip()) for part in text.split(","))
    for height, width in sizes:
        if height % 8 or width % 8 or min(height, width) < 8:
            near = "x".join(str(max(8, round(edge / 8) * 8)) for edge in (width, height))
            raise BadValueError(f"{width}x{height} is not a multiple of 8 on both edges", f"write {near}")
        if max(height, width) > _LONGEST_EDGE:
            raise BadValueError(
                f"{width}x{height} is more than {_LONGEST_EDGE} pixels on an edge",
                'write for example "1024x1024"',
            )
    return sizes


def _parse_size(part: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", part):
        return int(match[2]), int(match[1])
    try:
        number = float(part)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadValueError(
            f"{part!r} is not a size", 'write "1024x1024", "1024" or megapixels such as "1.0"'
        )
    edge = max(64, round(math.sqrt(number * 1e6) / 64) * 64) if number < 128 else int(number)
    return edge, edge
