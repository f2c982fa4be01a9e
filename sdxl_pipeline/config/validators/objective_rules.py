"""Invalid combinations of objective, noise and scheduled sampling, and settings without effect."""

from collections.abc import Iterator

from sdxl_pipeline.config.schema.key_facts import key_of
from sdxl_pipeline.config.schema.training import OBJECTIVE_SECTIONS, TrainingSettings
from sdxl_pipeline.config.validators.dataset_rules import Finding

TIMESTEPS = 1000
"""Timesteps of SDXL's noise schedule. The base model is not read here."""


def check_objective(training: TrainingSettings) -> Iterator[Finding]:
    """Yield invalid combinations of the settings of objective, noise and scheduled sampling."""
    yield from _check_prediction(training)
    yield from _check_soft_min_snr(training)
    yield from _check_weightings(training)
    if (
        training.timestep_bias_strategy == "range"
        and training.timestep_bias_begin >= training.timestep_bias_end
    ):
        yield Finding(
            "timestep_bias_begin",
            f"is not below timestep_bias_end ({training.timestep_bias_end}), so the range contains no timestep",
            f"write less than {training.timestep_bias_end}",
        )


def _check_prediction(training: TrainingSettings) -> Iterator[Finding]:
    if training.rescale_betas_zero_snr and training.prediction_type == "epsilon":
        yield Finding(
            "rescale_betas_zero_snr",
            "makes the last timestep pure noise, where predicting eps gives no information about the image, so sampling cannot start there",
            'write false, or "prediction_type": "v_prediction" for a base model that predicts v',
        )
    if training.rescale_betas_zero_snr and training.inference_scheduler_timestep_spacing == "leading":
        yield Finding(
            "inference_scheduler_timestep_spacing",
            "skips the last timestep, but with rescale_betas_zero_snr sampling must start there, from pure noise",
            "write trailing, or remove it",
        )
    if training.diff2flow_loss and not training.diff2flow_enabled:
        yield Finding(
            "diff2flow_loss", "needs diff2flow_enabled", 'write "diff2flow_enabled": true beside it'
        )
    if training.diff2flow_loss and training.prediction_type == "sample":
        yield Finding(
            "diff2flow_loss",
            "is defined for predictions of eps and v, but prediction_type is sample",
            "write false",
        )


def _check_soft_min_snr(training: TrainingSettings) -> Iterator[Finding]:
    given = [key for key in ("snr_gamma", "soft_min_snr_sigma_data") if getattr(training, key) is not None]
    if training.use_soft_min_snr and not given:
        yield Finding(
            "use_soft_min_snr",
            "needs a gamma or sigma_data",
            'write "snr_gamma": 5 beside it, or "soft_min_snr_sigma_data": 0.5, which is a gamma of 4',
        )
    if training.use_soft_min_snr and len(given) == 2:
        yield Finding(
            "soft_min_snr_sigma_data",
            "means snr_gamma = 1 / sigma_data^2, but snr_gamma is set as well",
            "keep one of the two",
        )


def _check_weightings(training: TrainingSettings) -> Iterator[Finding]:
    # each of these defines the complete weighting, so only one can apply
    chosen = {
        "diff2flow_loss": training.diff2flow_loss,
        "debiased_estimation_loss": training.debiased_estimation_loss,
        "snr_gamma": training.snr_gamma is not None or training.use_soft_min_snr,
        "snr_weight": training.snr_weight != 1.0,
    }
    first, *others = [key for key, is_chosen in chosen.items() if is_chosen] or [""]
    for key in others:
        off = {"snr_gamma": "0 and use_soft_min_snr false", "snr_weight": "1"}.get(key, "false")
        yield Finding(
            key,
            f"defines the loss weighting, but {first} does so already",
            f"keep one of them; off is {off}",
        )
    if training.loss_type == "l2":
        return
    for key in ("diff2flow_loss", "snr_weight"):
        if chosen[key]:
            yield Finding(
                "loss_type",
                f"is {training.loss_type}, but {key} needs the squared error",
                f'write "loss_type": "l2", or remove {key}',
            )


def unused_objective_settings(training: TrainingSettings) -> Iterator[str]:
    """Yield settings of objective, noise and scheduled sampling that have no effect, with the reason."""
    fields = {key: field for section in OBJECTIVE_SECTIONS for key, field in section.model_fields.items()}
    for key, field in fields.items():
        off = [switch for switch in key_of(field).needs if not getattr(training, switch)]
        if off and _is_changed(training, key):
            yield f"{key} = {getattr(training, key)} has no effect without {off[0]}"
    if training.offset_noise:
        for key in ("noise_offset", "noise_offset_probability"):
            if not getattr(training, key):
                yield f"offset_noise has no effect with {key} 0"
    if training.loss_type == "l2":
        for key in ("huber_c", "huber_schedule"):
            if _is_changed(training, key):
                yield f"{key} = {getattr(training, key)} has no effect with loss_type l2"
    elif training.huber_c == 1 and _is_changed(training, "huber_schedule"):
        yield f"huber_schedule = {training.huber_schedule} has no effect with huber_c 1: the threshold is 1 everywhere"
    if training.diff2flow_enabled and not training.diff2flow_loss:
        yield "diff2flow_enabled has no effect without diff2flow_loss"
    yield from _unused_bias(training)
    yield from _unused_rollouts(training)
    by_snr = training.snr_gamma or training.use_soft_min_snr or training.debiased_estimation_loss
    if training.rescale_betas_zero_snr and by_snr:
        yield (
            "rescale_betas_zero_snr gives the last timestep an SNR of 0, so SNR weighting gives it the weight 0: the prediction from "
            "pure noise is not trained"
        )


def _unused_bias(training: TrainingSettings) -> Iterator[str]:
    strategy, favoured = training.timestep_bias_strategy, training.favoured_timesteps(TIMESTEPS)
    if favoured is None:
        return
    others = (
        ("timestep_bias_begin", "timestep_bias_end") if strategy != "range" else ("timestep_bias_portion",)
    )
    for key in others:
        if _is_changed(training, key):
            yield f"{key} = {getattr(training, key)} has no effect with timestep_bias_strategy {strategy}"
    if training.timestep_bias_multiplier == 1.0:
        yield "timestep_bias_strategy has no effect with timestep_bias_multiplier 1: all timesteps are sampled equally"
    elif len(favoured) in (0, TIMESTEPS):
        amount = "none" if not favoured else "all"
        yield f"timestep_bias_strategy has no effect: it favours {amount} of the {TIMESTEPS} timesteps, which are then sampled equally"


def _unused_rollouts(training: TrainingSettings) -> Iterator[str]:
    if not training.scheduled_sampling_max_step_offset:
        return
    if training.scheduled_sampling_ramp_steps and training.scheduled_sampling_probability:
        yield "scheduled_sampling_probability has no effect with scheduled_sampling_ramp_steps; scheduled_sampling_prob_start and scheduled_sampling_prob_end replace it"
    if not training.scheduled_sampling_ramp_steps and not training.scheduled_sampling_probability:
        yield "scheduled_sampling_max_step_offset has no effect with scheduled_sampling_probability 0"
    ends = training.scheduled_sampling_prob_start, training.scheduled_sampling_prob_end
    if training.scheduled_sampling_ramp_steps and not any(ends):
        yield "scheduled_sampling_max_step_offset has no effect with scheduled_sampling_prob_start and scheduled_sampling_prob_end 0"
    if training.scheduled_sampling_sampler == "euler" and _is_changed(training, "scheduled_sampling_order"):
        yield "scheduled_sampling_order has no effect with scheduled_sampling_sampler euler"


def _is_changed(training: TrainingSettings, key: str) -> bool:
    default = type(training).model_fields[key].get_default(call_default_factory=True)
    value = getattr(training, key)
    return bool(value and value != default)  # SimpleTuner's files write 0 for "off"
