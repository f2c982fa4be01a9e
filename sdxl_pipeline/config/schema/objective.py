"""Settings of the objective: prediction target, loss and loss weighting."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import SettingsModel, Share, none_for_zero


class ObjectiveSettings(SettingsModel):
    """The objective."""

    rescale_betas_zero_snr: Annotated[bool | None, Key(used_by=("run_evaluation",))] = Field(
        None,
        description="Rescale the noise schedule to zero terminal SNR (Lin et al. 2023), for v-prediction; not set: as in the base model's scheduler config.",
    )
    snr_gamma: Annotated[Annotated[float, Field(gt=0)] | None, Key(on_card=True)] = Field(
        None, description="Min-SNR loss weighting (Hang et al. 2023), 5 in the paper; 0 or not set: off."
    )
    use_soft_min_snr: bool = Field(
        False,
        description="Soft Min-SNR weighting (Crowson et al. 2024); needs snr_gamma or soft_min_snr_sigma_data.",
    )
    soft_min_snr_sigma_data: Annotated[
        Annotated[float, Field(gt=0)] | None, Key(needs=("use_soft_min_snr",))
    ] = Field(
        None,
        description="Soft Min-SNR by the data's standard deviation instead of snr_gamma, which is then 1 / sigma_data^2: 0.5 is a gamma of 4.",
    )
    debiased_estimation_loss: bool = Field(
        False, description="Weight the eps loss by 1 / sqrt(SNR) (Yu et al. 2023)."
    )
    snr_weight: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Factor of the squared error; scale-invariant optimizers such as AdamW hardly depend on it.",
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = Field(
        "l2", description="Loss per element: squared error, or a robust loss that is linear for large errors."
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = Field(
        "snr",
        description="How the threshold of huber and smooth_l1 decreases from 1 to huber_c with increasing noise.",
    )
    huber_c: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Threshold above which huber and smooth_l1 are linear."
    )
    diff2flow_enabled: bool = Field(False, description="Allow diff2flow_loss.")
    diff2flow_loss: bool = Field(
        False,
        description="Compute the loss between the flow implied by the prediction and noise - latents (Schusterbauer et al. 2025).",
    )
    caption_dropout_probability: Annotated[Share, Key(on_card=True)] = Field(
        0.1, description="Share of samples trained with the empty prompt; size conditioning is unchanged."
    )
    micro_conditioning: Annotated[
        Literal["original", "resized"], Key(Identity.SAMPLES, used_by=("run_evaluation",))
    ] = Field(
        "original",
        description="original_size of SDXL's size conditioning: the file's own size, or the size after resizing (SimpleTuner).",
    )

    @field_validator("snr_gamma", mode="before")
    @classmethod
    def _zero_snr_gamma_to_none(cls, value: Any) -> Any:
        return none_for_zero(value)
