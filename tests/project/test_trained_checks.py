"""Holds: what cannot be trained together is refused at the door, with the reason and the way out."""

import pytest

from sdxl_pipeline.project.checks import check_training
from sdxl_pipeline.project.training import TrainingSettings


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


def test_an_adapter_freezes_no_layers():
    assert "trains none of them" in findings(layer_freeze_strategy="bitfit")["layer_freeze_strategy"]
