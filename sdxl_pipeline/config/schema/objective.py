"""Settings of the objective: prediction target, loss, timesteps and noise."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sdxl_pipeline.config.schema.key_facts import Identity, Key
from sdxl_pipeline.config.schema.settings_model import SettingsModel, Share, none_for_zero

Timestep = Annotated[int, Field(ge=0, le=1000)]
Steps = Annotated[int, Field(ge=0)]


class NoiseSettings(SettingsModel):
    """Noise and timesteps."""

    offset_noise: bool = Field(
        False, description="Add noise that is constant per channel, for darker and brighter images."
    )
    noise_offset: Annotated[float, Field(ge=0), Key(needs=("offset_noise",))] = Field(
        0.1, description="Standard deviation of offset_noise."
    )
    noise_offset_probability: Annotated[Share, Key(needs=("offset_noise",))] = Field(
        0.25, description="Share of samples that get offset_noise."
    )
    input_perturbation: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Standard deviation of extra input noise that is not part of the target (Ning et al. 2023), 0.1 in the paper.",
    )
    input_perturbation_steps: Annotated[Steps, Key(needs=("input_perturbation",))] = Field(
        0, description="Optimizer steps over which input_perturbation decreases to 0; 0 leaves it constant."
    )
    timestep_bias_strategy: Literal["earlier", "later", "range"] | None = Field(
        None,
        description="Timesteps to sample more often: those with less noise (earlier), with more (later), or a range.",
    )
    timestep_bias_multiplier: Annotated[float, Field(gt=0), Key(needs=("timestep_bias_strategy",))] = Field(
        1.0, description="Factor by which the biased timesteps are sampled more often."
    )
    timestep_bias_portion: Annotated[Share, Key(needs=("timestep_bias_strategy",))] = Field(
        0.25, description="Share of the schedule that counts as earlier or later."
    )
    timestep_bias_begin: Annotated[Timestep, Key(needs=("timestep_bias_strategy",))] = Field(
        0, description="First timestep of the range."
    )
    timestep_bias_end: Annotated[Timestep, Key(needs=("timestep_bias_strategy",))] = Field(
        1000, description="End of the range (exclusive)."
    )
    disable_segmented_timestep_sampling: bool = Field(
        True,
        description="false splits the schedule into one segment per sample of a global batch and samples one timestep from each (stratified).",
    )

    def favoured_timesteps(self, num_train_timesteps: int) -> range | None:
        """Return the timesteps that are sampled more often than the others; None without a bias.

        "earlier" timesteps are those with less noise, as in diffusers' training scripts.
        """
        portion = int(self.timestep_bias_portion * num_train_timesteps)
        match self.timestep_bias_strategy:
            case None:
                return None
            case "earlier":
                return range(portion)
            case "later":
                return range(num_train_timesteps - portion, num_train_timesteps)
            case "range":
                return range(self.timestep_bias_begin, min(self.timestep_bias_end, num_train_timesteps))


class ScheduledSamplingSettings(SettingsModel):
    """Scheduled sampling."""

    scheduled_sampling_max_step_offset: Annotated[int, Field(ge=0, lt=1000)] = Field(
        0,
        description="Maximum timesteps that the model denoises itself before the training step, each a forward pass without gradient; 0 is off.",
    )
    scheduled_sampling_probability: Annotated[Share, Key(needs=("scheduled_sampling_max_step_offset",))] = (
        Field(0.0, description="Share of samples with a rollout, from scheduled_sampling_start_step on.")
    )
    scheduled_sampling_ramp_steps: Annotated[Steps, Key(needs=("scheduled_sampling_max_step_offset",))] = (
        Field(
            0,
            description="Optimizer steps over which the share changes from scheduled_sampling_prob_start to scheduled_sampling_prob_end; 0: it is scheduled_sampling_probability.",
        )
    )
    scheduled_sampling_prob_start: Annotated[
        Share, Key(needs=("scheduled_sampling_max_step_offset", "scheduled_sampling_ramp_steps"))
    ] = Field(0.0, description="Share up to the start of the ramp.")
    scheduled_sampling_prob_end: Annotated[
        Share, Key(needs=("scheduled_sampling_max_step_offset", "scheduled_sampling_ramp_steps"))
    ] = Field(0.5, description="Share from the end of the ramp on.")
    scheduled_sampling_start_step: Annotated[Steps, Key(needs=("scheduled_sampling_max_step_offset",))] = (
        Field(0, description="Optimizer step at which the ramp, or without a ramp the rollouts, start.")
    )
    scheduled_sampling_ramp_shape: Annotated[
        Literal["linear", "cosine"],
        Key(needs=("scheduled_sampling_max_step_offset", "scheduled_sampling_ramp_steps")),
    ] = Field("linear", description="Shape of the ramp.")
    scheduled_sampling_strategy: Annotated[
        Literal["uniform", "biased_early", "biased_late"], Key(needs=("scheduled_sampling_max_step_offset",))
    ] = Field(
        "uniform",
        description="Distribution of the offsets: uniform, towards small ones, or towards large ones.",
    )
    scheduled_sampling_sampler: Annotated[
        Literal["unipc", "euler", "dpm"], Key(needs=("scheduled_sampling_max_step_offset",))
    ] = Field("unipc", description="Solver of the rollouts.")
    scheduled_sampling_order: Annotated[
        int, Field(ge=1, le=3), Key(needs=("scheduled_sampling_max_step_offset",))
    ] = Field(2, description="Order of unipc and dpm; euler's is 1.")


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
