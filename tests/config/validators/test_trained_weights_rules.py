"""Invalid combinations of model_type, text encoders and FSDP are problems with reason and hint."""

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.settings_rules import check_training, unused_training_settings


def findings(**settings: object) -> dict[str, str]:
    return {found.key: found.message for found in check_training(TrainingSettings.model_validate(settings))}


def test_check_trained_weights_full_has_no_problem():
    assert findings(model_type="full", base_model_precision="no_change", lora_type="standard") == {}
    assert findings(model_type="full", layer_freeze_strategy="bitfit") == {}
    assert findings(model_type="lora", layer_freeze_strategy="none") == {}


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"lora_rank": 64}, "lora_rank", "applies to an adapter"),
        ({"lora_alpha": 8}, "lora_alpha", "applies to an adapter"),
        ({"lora_target_modules": "to_q"}, "lora_target_modules", "applies to an adapter"),
        ({"base_model_precision": "int8-quanto"}, "base_model_precision", "needs full precision"),
        ({"optimizer": "adamw_bf16", "mixed_precision": "no"}, "mixed_precision", "train the UNet in bf16"),
    ],
)
def test_check_trained_weights_invalid_with_full_reports_the_reason(settings, key, reason):
    assert reason in findings(model_type="full", **settings)[key]


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"model_type": "full"}, "train_text_encoder", "saves no adapter file"),
        (
            {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}},
            "train_text_encoder",
            "UNet's adapter only",
        ),
        ({"text_encoder_2_precision": "int8-quanto"}, "text_encoder_2_precision", "is not tested"),
        ({"optimizer": "prodigy", "text_encoder_lr": 1e-5}, "text_encoder_lr", "one rate for all"),
    ],
)
def test_check_trained_weights_invalid_with_text_encoders_reports_the_reason(settings, key, reason):
    assert reason in findings(train_text_encoder=True, **settings)[key]


def test_text_encoder_lr_without_trained_encoders_is_reported_as_unused():
    settings = TrainingSettings.model_validate({"text_encoder_lr": 1e-6})
    assert [line for line in unused_training_settings(settings) if "text_encoder_lr" in line]
    trained = TrainingSettings.model_validate({"text_encoder_lr": 1e-6, "train_text_encoder": "true"})
    assert not [line for line in unused_training_settings(trained) if "text_encoder_lr" in line]


def test_text_cache_of_is_disable_for_trained_text_encoders(make_project):
    trained = load_project(make_project("trained", config={"train_text_encoder": True}))
    frozen = load_project(make_project("frozen"))
    assert [trained.text_cache_of(dataset) for dataset in trained.datasets] == ["disable"]
    assert [frozen.text_cache_of(dataset) for dataset in frozen.datasets] == ["full"]


def test_layer_freeze_strategy_with_lora_is_a_problem():
    assert "trains none of them" in findings(layer_freeze_strategy="bitfit")["layer_freeze_strategy"]
