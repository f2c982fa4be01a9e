"""Holds: what cannot be trained together is refused at the door, with the reason and the way out."""

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.settings_rules import check_training, unused_settings_of


def findings(**settings: object) -> dict[str, str]:
    return {found.key: found.message for found in check_training(TrainingSettings.model_validate(settings))}


def test_a_full_training_alone_is_fine():
    assert findings(model_type="full", base_model_precision="no_change", lora_type="standard") == {}
    assert findings(model_type="full", layer_freeze_strategy="bitfit") == {}
    assert findings(model_type="lora", layer_freeze_strategy="none") == {}


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"lora_rank": 64}, "lora_rank", "is about an adapter"),
        ({"lora_alpha": 8}, "lora_alpha", "is about an adapter"),
        ({"lora_target_modules": "to_q"}, "lora_target_modules", "is about an adapter"),
        ({"base_model_precision": "int8-quanto"}, "base_model_precision", "fewer bits than a gradient step"),
        ({"optimizer": "adamw_bf16", "mixed_precision": "no"}, "mixed_precision", "whole UNet in bf16"),
    ],
)
def test_what_a_full_training_cannot_have(settings, key, reason):
    assert reason in findings(model_type="full", **settings)[key]


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"model_type": "full"}, "train_text_encoder", "makes no file that could hold it"),
        (
            {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}},
            "train_text_encoder",
            "UNet's adapter alone",
        ),
        ({"text_encoder_2_precision": "int8-quanto"}, "text_encoder_2_precision", "has not been tried"),
        ({"optimizer": "prodigy", "text_encoder_lr": 1e-5}, "text_encoder_lr", "one rate for all"),
    ],
)
def test_what_trained_text_encoders_cannot_have(settings, key, reason):
    assert reason in findings(train_text_encoder=True, **settings)[key]


def test_a_rate_of_encoders_that_are_not_trained_is_said_to_be_idle():
    settings = TrainingSettings.model_validate({"text_encoder_lr": 1e-6})
    assert [line for line in unused_settings_of(settings) if "text_encoder_lr" in line]
    trained = TrainingSettings.model_validate({"text_encoder_lr": 1e-6, "train_text_encoder": "true"})
    assert not [line for line in unused_settings_of(trained) if "text_encoder_lr" in line]


def test_no_text_cache_is_made_for_encoders_that_are_trained(make_project):
    trained = load_project(make_project("trained", config={"train_text_encoder": True}))
    frozen = load_project(make_project("frozen"))
    assert [trained.text_cache_of(dataset) for dataset in trained.datasets] == ["disable"]
    assert [frozen.text_cache_of(dataset) for dataset in frozen.datasets] == ["full"]


def test_an_adapter_freezes_no_layers():
    assert "trains none of them" in findings(layer_freeze_strategy="bitfit")["layer_freeze_strategy"]
