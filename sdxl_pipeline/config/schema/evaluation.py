"""Settings of the evaluation."""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import (
    BadValueError,
    Count,
    SettingsModel,
    Share,
    none_for_zero,
    read_list,
)

Severity = Literal["blocking", "warning"]
"""Whether a failed check of the evaluation prevents the release."""

EVALUATION_CHECK_NAMES: Final = (
    "better_than_base",
    "enough_eval_images",
    "not_worse_than_last_release",
    "not_memorised",
    "not_overfitted",
    "checkpoint_selected",
    "images_valid",
    "release_formats_valid",
)
"""The checks whose severity `evaluation_checks` sets."""

_SEVERITIES: Final = get_args(Severity)


class EvaluationSettings(SettingsModel):
    """Evaluation."""

    evaluation_type: Annotated[
        Literal["none", "clip"], Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field("none", description="clip also scores the gallery with CLIP.")
    pretrained_evaluation_model_name_or_path: Annotated[
        str, Key(Identity.VALIDATION, path="name or path", overridable=False, used_by=("evaluation",))
    ] = Field(
        "openai/clip-vit-large-patch14",
        min_length=1,
        description="CLIP model of the scores: Hub id, local folder or bundled:tiny-clip.",
    )
    eval_loss_disable: Annotated[bool, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        False, description="Do not compute the eval loss."
    )
    eval_timesteps: Annotated[
        int, Field(ge=1, le=1000), Key(Identity.VALIDATION, used_by=("evaluation",))
    ] = Field(28, description="Number of timesteps that the eval loss is averaged over.")
    num_eval_images: Annotated[Count | None, Key(Identity.VALIDATION, used_by=("evaluation",))] = Field(
        None, description="Maximum images of the eval loss; not set: all."
    )
    eval_dataset_id: Annotated[
        str | None, Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field(None, description="The eval dataset to use; not set: all of them.")
    num_probe_images: Annotated[
        int, Field(ge=0), Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field(
        8,
        description="Training images whose eval loss is compared with that of the held-out images, to detect over-fitting; 0: none.",
    )
    num_caption_samples: Annotated[
        int, Field(ge=0, le=64), Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field(
        16,
        description="Images generated from training captions, for memorisation, CMMD, fidelity and diversity; 0: none of these.",
    )
    caption_sample_seeds: Annotated[
        Count,
        Key(Identity.VALIDATION, overridable=False, needs=("num_caption_samples",), used_by=("evaluation",)),
    ] = Field(2, description="Images of num_caption_samples per caption, with successive seeds.")
    memorisation_limit: Annotated[
        Share,
        Key(Identity.VALIDATION, overridable=False, needs=("num_caption_samples",), used_by=("evaluation",)),
    ] = Field(0.1, description="Largest share of these images that may be copies of training images.")
    pretrained_similarity_model_name_or_path: Annotated[
        str | None,
        Key(
            Identity.VALIDATION,
            path="name or path",
            overridable=False,
            needs=("num_caption_samples",),
            used_by=("evaluation",),
        ),
    ] = Field(
        None,
        min_length=1,
        description="DINOv2 model that compares these images with the training images: Hub id or local folder; not set: the CLIP model.",
    )
    gallery_checkpoints: Annotated[
        int, Field(ge=0), Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",))
    ] = Field(
        4,
        description="Checkpoints that the gallery shows, evenly spaced, beside the selected one; 0: only the selected one.",
    )
    gallery_scales: Annotated[
        tuple[Annotated[float, Field(gt=0, le=10)], ...],
        Key(Identity.VALIDATION, overridable=False, used_by=("evaluation",)),
    ] = Field(
        (),
        description="Scales of the selected adapter that the gallery shows, such as [0.4, 0.7, 1]; not set: only 1.",
    )
    evaluation_checks: Annotated[
        dict[str, Severity],
        Key(Identity.VALIDATION, overridable=False, used_by=("evaluation_checks", "hub_release")),
    ] = Field(
        {},
        description='Whether a failed check is blocking or a warning, such as {"better_than_base": "warning"}: '
        f"{', '.join(EVALUATION_CHECK_NAMES)}.",
    )
    release_tolerance: Annotated[
        float,
        Field(ge=0),
        Key(Identity.VALIDATION, overridable=False, used_by=("evaluation_checks", "hub_release")),
    ] = Field(
        0.0,
        description="How much higher than the last release's the eval loss may be, relative to it, before the check not_worse_than_last_release "
        "fails: 0.02 is 2 percent.",
    )
    eval_steps_interval: Annotated[Count | None, Key(Identity.VALIDATION)] = Field(
        None, description="Steps between eval losses during training; not set or 0: none by steps."
    )
    eval_epoch_interval: Annotated[Annotated[float, Field(gt=0)] | None, Key(Identity.VALIDATION)] = Field(
        None,
        description="Epochs between eval losses during training, 0.5 for two per epoch; not set or 0: none by epochs.",
    )
    early_stopping_patience: Annotated[Count | None, Key(Identity.VALUE_IF_SET)] = Field(
        None,
        description="Stop the training after this many eval losses in a row that are not below the lowest one; not set or 0: never.",
    )
    early_stopping_min_delta: Annotated[
        float, Field(ge=0), Key(Identity.VALUE_IF_SET, needs=("early_stopping_patience",))
    ] = Field(0.0, description="How far below the lowest eval loss the next one must be to count as lower.")
    eval_holdout_share: Annotated[float, Field(ge=0, le=0.5), Key(Identity.SAMPLES, overridable=False)] = (
        Field(
            0.1,
            description="Share of each dataset held out for the eval loss if there is no eval dataset: at least 1 image of 8, 2 of 20.",
        )
    )

    @property
    def eval_loss_in_training(self) -> bool:
        """Return whether the eval loss is computed during training."""
        intervals = (self.eval_steps_interval, self.eval_epoch_interval)
        return not self.eval_loss_disable and any(interval is not None for interval in intervals)

    @field_validator("eval_steps_interval", "eval_epoch_interval", "early_stopping_patience", mode="before")
    @classmethod
    def _zero_eval_setting_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)

    @field_validator("gallery_scales", mode="before")
    @classmethod
    def _read_gallery_scales(cls, value: Any) -> Any:
        return read_list(value)

    @field_validator("evaluation_checks", mode="before")
    @classmethod
    def _check_evaluation_checks(cls, value: Any) -> Any:
        hint = f"write for example {{{json.dumps(EVALUATION_CHECK_NAMES[0])}: {json.dumps(_SEVERITIES[-1])}}}"
        if not isinstance(value, Mapping):
            raise BadValueError("must be an object of checks and their severity", hint)
        for name, severity in value.items():
            if name not in EVALUATION_CHECK_NAMES:
                near = difflib.get_close_matches(str(name), EVALUATION_CHECK_NAMES, n=1)
                raise BadValueError(
                    f"{name} is not a check of the evaluation",
                    f"write {near[0] if near else 'one of ' + ', '.join(EVALUATION_CHECK_NAMES)}",
                )
            if severity not in _SEVERITIES:
                raise BadValueError(
                    f"{name} is {json.dumps(severity)}, which is not a severity",
                    f"write {' or '.join(map(json.dumps, _SEVERITIES))}",
                )
        return value
