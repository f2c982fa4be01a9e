"""Aliases, unknown keys, unsupported keys and ignored keys, with readable messages."""

from pathlib import Path

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import IMAGES, TEXT_EMBEDS, TRAINING


@pytest.mark.parametrize(
    ("spelled", "key", "value"),
    [
        ("--learning_rate", "learning_rate", 3e-5),
        ("use_gradient_checkpointing", "gradient_checkpointing", True),
        ("--checkpointing_steps", "checkpoint_step_interval", 50),
        ("validation_steps", "validation_step_interval", 20),
        ("peft_lora_target_modules", "lora_target_modules", ("to_q",)),
        ("save_total_limit", "checkpoints_total_limit", 3),
    ],
)
def test_parse_settings_accepts_aliases(write_project, spelled, key, value):
    assert getattr(load_project(write_project({spelled: value})).training, key) == value


def test_parse_settings_aliases_of_one_key_must_agree(problems_of, write_project):
    config = {"gradient_checkpointing": True, "--use_gradient_checkpointing": False}
    (problem,) = problems_of(config).values()
    assert problem.key == "--use_gradient_checkpointing"
    assert "gradient_checkpointing" in problem.message
    config["--use_gradient_checkpointing"] = True
    assert load_project(write_project(config)).training.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rat", "learning_rate"), ("use_gradient_checkpoint", "use_gradient_checkpointing")],
)
def test_parse_settings_unknown_key_hint_contains_the_closest_key(problems_of, key, nearest):
    assert problems_of({key: 1})[key].hint == f"write {nearest}"


def test_parse_settings_key_of_the_other_file_hint_contains_that_file(problems_of):
    problems = problems_of({"crop_style": "random"}, [{"id": "a", "instance_data_dir": "d", "lora_rank": 4}])
    assert "multidatabackend.json" in problems["crop_style"].hint
    assert "config.json" in problems['[1] "a".lora_rank'].hint


@pytest.mark.parametrize(
    "config",
    [
        {"peft_lora_mode": "singlora"},
        {"optimizer": "soap"},
        {"num_processes": 2},
        {"gradient_checkpointing_backend": "unsloth"},
        {"gradient_checkpointing_offload_attention": True},
        {"accelerate_extra_args": "--mixed_precision fp8"},
    ],
)
def test_parse_settings_unsupported_key_is_a_problem(problems_of, config):
    (key,) = config
    problem = problems_of(config)[key]
    assert "not supported" in problem.message
    assert problem.value == config[key]


def test_parse_settings_unsupported_key_with_off_value_is_accepted(write_project):
    config = {
        "webhook_config": None,
        "validation_prompt_library": False,
        "num_processes": 1,
    }
    project = load_project(write_project(config))
    assert project.warnings == ()
    assert project.training == load_project(write_project()).training


@pytest.mark.parametrize("key", ["disable_benchmark", "flux_guidance_mode", "max_workers", "--disable_tf32"])
def test_parse_settings_ignored_key_is_a_warning(write_project, key):
    (warning,) = load_project(write_project({key: True})).warnings
    assert key in warning


@pytest.mark.parametrize(
    ("model", "schema"),
    [(TrainingSettings, TRAINING), (ImageDataset, IMAGES), (TextEmbedsDataset, TEXT_EMBEDS)],
)
def test_key_schema_groups_are_disjoint(model, schema):
    kinds = [
        set(model.model_fields),
        set(schema.spellings),
        set(schema.unsupported),
        set(schema.inactive),
        schema.ignored,
    ]
    for position, kind in enumerate(kinds):
        for other in kinds[position + 1 :]:
            assert kind & other == set()
    assert [key for key in model.model_fields if schema.is_ignored(key)] == []
    known = kinds[0] | kinds[2]
    # a switch that works here may be on, and what it does not tune would then be passed over without a word
    assert set(schema.inactive.values()) <= kinds[2] | {"type"}
    assert set(schema.spellings.values()) <= known
    assert set(schema.unsupported_values) <= set(model.model_fields)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_rank", 0, "must be at least 1"),
        ("lora_rank", "many", "must be a whole number"),
        ("lora_rank", 1.5, "must be a whole number"),
        ("lora_rank", True, "must be a number, not true or false"),
        ("learning_rate", [1], "must be a number"),
        ("push_to_hub", "perhaps", "must be true or false"),
        ("validation_prompt", 3, "must be text"),
        ("mixed_precision", "fp8", "fp8 is not supported"),
        ("mixed_precision", "BF16", "is not one of the known values"),
        ("model_family", "flux", "this project trains Stable Diffusion XL"),
        ("report_to", "wandbb", "is not one of the known values"),
        ("validation_resolution", "100x100", "100x100 is not a multiple of 8 on both edges"),
        ("aspect_bucket_alignment", 60, "must be a multiple of 8"),
    ],
)
def test_parse_settings_invalid_value_message_is_readable(problems_of, key, value, message):
    problem = problems_of({key: value})[key]
    assert message in problem.message
    assert "pydantic" not in str(problem)


WRONG = {"nobody": {"knows": ["this"]}}
INLINE = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 1}


@pytest.mark.parametrize("value", [WRONG, [WRONG], 5.5, -7, "\x00", True, None, {}])
@pytest.mark.parametrize(
    ("model", "schema"),
    [(TrainingSettings, TRAINING), (ImageDataset, IMAGES), (TextEmbedsDataset, TEXT_EMBEDS)],
)
def test_parse_settings_any_value_of_any_key_never_raises(model, schema, value):
    for key in model.model_fields:
        for problem in parse_settings({key: value}, model, schema, Path("config.json")).problems:
            assert problem.message
            assert "pydantic" not in str(problem)


@pytest.mark.parametrize(
    ("changes", "key", "message", "hint"),
    [
        ({"fctor": 4}, "lycoris_config.fctor", "is not a known key", "factor"),
        ({"algo": "nope"}, "lycoris_config.algo", "is not one of the known values", "lokr"),
        ({"linear_dim": "x"}, "lycoris_config.linear_dim", "must be a whole number", "whole number"),
        (
            {"apply_preset": {"target_modul": []}},
            "lycoris_config.apply_preset.target_modul",
            "is not a known key",
            "target_module",
        ),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"factr": 4}}}},
            "lycoris_config.apply_preset.module_algo_map",
            "Attention: factr is not a known key",
            "factor",
        ),
    ],
)
def test_parse_settings_error_in_object_of_a_union_has_its_key_path(problems_of, changes, key, message, hint):
    (problem,) = problems_of({"lora_type": "lycoris", "lycoris_config": {**INLINE, **changes}}).values()
    assert problem.key == key
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize("value", [["a"], 5])
def test_parse_settings_neither_object_nor_path_is_a_problem(problems_of, value):
    (problem,) = problems_of({"lora_type": "lycoris", "lycoris_config": value}).values()
    assert problem.key == "lycoris_config"
    assert "must be an object" in problem.message
