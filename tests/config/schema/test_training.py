"""Conversion of written values, invalid values, and the JSON round trip of settings."""

import json

import pytest
from pydantic import ValidationError

from sdxl_pipeline.config.schema.optimization import parse_assignments
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.schema.validation import parse_sizes


def test_training_settings_strings_are_converted_to_typed_values():
    settings = TrainingSettings.model_validate(
        {
            "learning_rate": "1e-4",
            "train_batch_size": "3",
            "push_to_hub": "true",
            "gradient_checkpointing": "False",
            "lora_alpha": "none",
            "snr_gamma": "5",
            "report_to": "tensorboard, wandb",
            "lora_target_modules": '["to_q", "to_k"]',
            "optimizer_config": "beta1=0.95,amsgrad=true,mode=fast",
            "validation_resolution": 1.0,
            "vae_dtype": "default",
            "resume_from_checkpoint": "none",
        }
    )
    assert settings.learning_rate == 1e-4
    assert settings.train_batch_size == 3
    assert settings.push_to_hub is True
    assert settings.gradient_checkpointing is False
    assert settings.lora_alpha is None
    assert settings.snr_gamma == 5.0
    assert settings.report_to == ("tensorboard", "wandb")
    assert settings.lora_target_modules == ("to_q", "to_k")
    assert settings.optimizer_config == {"beta1": 0.95, "amsgrad": True, "mode": "fast"}
    assert settings.validation_sizes == ((1024, 1024),)
    assert settings.vae_dtype is None
    assert settings.resume_from_checkpoint is None


def test_training_settings_json_round_trip_is_equal():
    settings = TrainingSettings(
        optimizer_config={"beta1": 0.9, "amsgrad": True, "mode": "fast"},
        report_to=("wandb",),
        lora_target_modules=("to_q",),
        mixed_precision="bf16",
        max_train_steps=7,
        resume_from_checkpoint=None,
        validation_resolution="1280x768",
    )
    again = TrainingSettings.model_validate(json.loads(settings.model_dump_json()))
    assert again == settings
    assert TrainingSettings.model_validate(again.model_dump(mode="json")) == settings


def test_training_settings_every_key_has_a_description():
    assert [key for key, field in TrainingSettings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, None, 1),
        ({"max_train_steps": 100}, 100, None),
        ({"max_train_steps": "100", "num_train_epochs": "0"}, 100, None),
        ({"max_train_steps": 0, "num_train_epochs": 3}, None, 3),
        ({"max_train_steps": 0, "num_train_epochs": 0}, None, 1),
    ],
)
def test_training_settings_zero_length_uses_the_other_key(given, steps, epochs):
    settings = TrainingSettings.model_validate(given)
    assert (settings.max_train_steps, settings.num_train_epochs) == (steps, epochs)


def test_snr_gamma_zero_is_none():
    assert TrainingSettings.model_validate({"snr_gamma": 0}).snr_gamma is None


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1024x1024,1280x768", ((1024, 1024), (768, 1280))),  # WxH in text, (height, width) as a tuple
        ("768", ((768, 768),)),
        ("128", ((128, 128),)),
        ("1", ((1024, 1024),)),
        ("0.5", ((704, 704),)),
    ],
)
def test_parse_sizes_returns_height_and_width(text, sizes):
    assert TrainingSettings(validation_resolution=text).validation_sizes == sizes


@pytest.mark.parametrize("text", ["", "big", "1024x", "100x100", "0", "-512", "inf", "1024,"])
def test_parse_sizes_invalid_size_raises(text):
    with pytest.raises(ValueError, match=r"not a size|multiple of 8"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["beta1", "beta1=", "=1", "beta1=1,beta1=2"])
def test_parse_assignments_malformed_text_raises(text):
    with pytest.raises(ValueError, match=r"form name=value|given twice"):
        parse_assignments(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_rank", True),
        ("lora_rank", 0),
        ("lora_dropout", 1.0),
        ("learning_rate", "fast"),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("caption_dropout_probability", 1.5),
        ("aspect_bucket_alignment", 60),
        ("optimizer", "sgdd"),
        ("hub_model_id", "a/b/c"),
        ("retraining_cron", "sundays"),
        ("seed", -1),
        ("report_to", "tensorbord"),
    ],
)
def test_training_settings_out_of_range_value_raises(key, value):
    with pytest.raises(ValidationError) as caught:
        TrainingSettings.model_validate({key: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {key}


def test_effective_alpha_and_validation_seed_default_to_rank_and_seed():
    assert TrainingSettings(lora_rank=8).effective_lora_alpha == 8.0
    assert TrainingSettings(lora_rank=8, lora_alpha=2).effective_lora_alpha == 2.0
    assert TrainingSettings(seed=7).effective_validation_seed == 7
    assert TrainingSettings(seed=7, validation_seed=0).effective_validation_seed == 0
