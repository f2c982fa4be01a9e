"""Mutually exclusive objectives are problems with the reason; settings without effect are reported once."""

import pytest

from sdxl_pipeline.config.loader import load_project

SPELLED_OUT_AS_OFF = {
    "loss_type": "l2",
    "huber_c": 0.1,
    "huber_schedule": "snr",
    "snr_weight": "1.0",
    "offset_noise": False,
    "noise_offset_probability": 0.25,
    "input_perturbation": "0",
    "timestep_bias_strategy": "none",
    "timestep_bias_end": 1000,
    "scheduled_sampling_max_step_offset": "0",
    "scheduled_sampling_probability": 0,
    "scheduled_sampling_sampler": "unipc",
    "diff2flow_enabled": "false",
    "use_soft_min_snr": None,
}


def test_objective_defaults_written_out_have_no_warning(write_project):
    project = load_project(write_project(SPELLED_OUT_AS_OFF))
    assert project.warnings == ()
    assert project.training == load_project(write_project()).training


@pytest.mark.parametrize(
    ("config", "key", "message", "hint"),
    [
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "rescale_betas_zero_snr",
            "pure noise",
            "v_prediction",
        ),
        ({"diff2flow_loss": True}, "diff2flow_loss", "diff2flow_enabled", "true"),
        (
            {"diff2flow_enabled": True, "diff2flow_loss": True, "prediction_type": "sample"},
            "diff2flow_loss",
            "sample",
            "false",
        ),
        (
            {"diff2flow_enabled": True, "diff2flow_loss": True, "snr_gamma": 5},
            "snr_gamma",
            "diff2flow_loss does so already",
            "0",
        ),
        (
            {"diff2flow_enabled": True, "diff2flow_loss": True, "loss_type": "huber"},
            "loss_type",
            "squared error",
            "l2",
        ),
        ({"snr_gamma": 5, "debiased_estimation_loss": True}, "snr_gamma", "debiased", "0"),
        ({"snr_gamma": 5, "snr_weight": 2}, "snr_weight", "snr_gamma", "1"),
        ({"snr_weight": 2, "loss_type": "smooth_l1"}, "loss_type", "snr_weight", "l2"),
        ({"use_soft_min_snr": True}, "use_soft_min_snr", "needs a gamma or sigma_data", "snr_gamma"),
        (
            {"use_soft_min_snr": True, "snr_gamma": 5, "soft_min_snr_sigma_data": 1},
            "soft_min_snr_sigma_data",
            "1 / sigma_data^2",
            "one of the two",
        ),
        (
            {
                "timestep_bias_strategy": "range",
                "timestep_bias_multiplier": 2,
                "timestep_bias_begin": 600,
                "timestep_bias_end": 600,
            },
            "timestep_bias_begin",
            "the range contains no timestep",
            "less than 600",
        ),
        ({"timestep_bias_multiplier": 0}, "timestep_bias_multiplier", "above 0", "above 0"),
        ({"timestep_bias_end": 2000}, "timestep_bias_end", "at most 1000", "1000"),
        ({"huber_c": 0}, "huber_c", "above 0", "above 0"),
        ({"prediction_type": "flow_matching"}, "prediction_type", "not supported", "epsilon"),
        ({"scheduled_sampling_sampler": "unipcc"}, "scheduled_sampling_sampler", "known values", "unipc"),
    ],
)
def test_check_objective_invalid_combination_reports_key_and_hint(problems_of, config, key, message, hint):
    problem = problems_of(config)[key]
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise_offset": 0.05}, "noise_offset = 0.05 has no effect without offset_noise"),
        ({"offset_noise": True, "noise_offset": 0}, "offset_noise has no effect"),
        ({"huber_c": 0.3}, "loss_type l2"),
        ({"soft_min_snr_sigma_data": 0.5}, "without use_soft_min_snr"),
        ({"diff2flow_enabled": True}, "without diff2flow_loss"),
        ({"timestep_bias_portion": 0.5}, "without timestep_bias_strategy"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_multiplier 1"),
        ({"scheduled_sampling_probability": 0.5}, "without scheduled_sampling_max_step_offset"),
        ({"scheduled_sampling_max_step_offset": 5}, "scheduled_sampling_probability 0"),
        (
            {
                "scheduled_sampling_max_step_offset": 5,
                "scheduled_sampling_probability": 1,
                "scheduled_sampling_ramp_steps": 100,
            },
            "scheduled_sampling_probability has no effect",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 5,
                "scheduled_sampling_probability": 1,
                "scheduled_sampling_prob_end": 0.8,
            },
            "prob_end = 0.8 has no effect without scheduled_sampling_ramp_steps",
        ),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "snr_gamma": 5},
            "the prediction from pure noise is not trained",
        ),
        (
            {
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
                "use_soft_min_snr": True,
                "soft_min_snr_sigma_data": 1,
            },
            "the prediction from pure noise is not trained",
        ),
        ({"scheduled_sampling_reflexflow": True}, "no meaning"),
        (
            {"offset_noise": True, "noise_offset_probability": 0},
            "offset_noise has no effect with noise_offset_probability 0",
        ),
        (
            {"loss_type": "huber", "huber_c": 1, "huber_schedule": "constant"},
            "huber_schedule = constant has no effect",
        ),
        ({"timestep_bias_strategy": "range", "timestep_bias_multiplier": 3}, "favours all of the 1000"),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3, "timestep_bias_portion": 0},
            "favours none",
        ),
        (
            {
                "timestep_bias_strategy": "earlier",
                "timestep_bias_multiplier": 3,
                "timestep_bias_portion": 0.0004,
            },
            "favours none",
        ),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3, "timestep_bias_begin": 200},
            "timestep_bias_begin = 200 has no effect with timestep_bias_strategy later",
        ),
        (
            {
                "timestep_bias_strategy": "range",
                "timestep_bias_multiplier": 3,
                "timestep_bias_begin": 100,
                "timestep_bias_end": 200,
                "timestep_bias_portion": 0.5,
            },
            "timestep_bias_portion = 0.5 has no effect with timestep_bias_strategy range",
        ),
        (
            {
                "scheduled_sampling_max_step_offset": 4,
                "scheduled_sampling_ramp_steps": 5,
                "scheduled_sampling_prob_end": 0,
            },
            "scheduled_sampling_prob_start and scheduled_sampling_prob_end 0",
        ),
    ],
)
def test_unused_objective_settings_are_reported_once(write_project, config, message):
    (warning,) = load_project(write_project(config)).warnings
    assert message in warning


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": "true", "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True},  # the base model may say that it predicts v
        {"use_soft_min_snr": True, "snr_gamma": 5},
        {"snr_gamma": 5, "loss_type": "huber", "huber_schedule": "exponential"},
        {"offset_noise": True, "noise_offset": "0.05", "noise_offset_probability": 1},
        {"disable_segmented_timestep_sampling": False},
        {
            "diff2flow_enabled": True,
            "diff2flow_loss": True,
            "scheduled_sampling_max_step_offset": 5,
            "scheduled_sampling_ramp_steps": 100,
        },
    ],
)
def test_objective_valid_combination_has_no_warning(write_project, config):
    assert load_project(write_project(config)).warnings == ()
