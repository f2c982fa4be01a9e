"""Holds: spellings, unknown keys, keys of later work and keys without meaning, each told in the user's terms."""

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
def test_other_spellings(write_project, spelled, key, value):
    assert getattr(load_project(write_project({spelled: value})).training, key) == value


def test_one_setting_under_two_spellings_must_agree(problems_of, write_project):
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
def test_an_unknown_key_is_answered_with_the_nearest_known_one(problems_of, key, nearest):
    assert problems_of({key: 1})[key].hint == f"write {nearest}"


def test_a_key_in_the_wrong_file_is_sent_to_the_other(problems_of):
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
def test_what_is_not_available_yet_is_refused(problems_of, config):
    (key,) = config
    problem = problems_of(config)[key]
    assert "not available yet" in problem.message
    assert problem.value == config[key]


def test_what_is_not_available_yet_may_be_spelled_out_as_off(write_project):
    config = {
        "webhook_config": None,
        "validation_prompt_library": False,
        "num_processes": 1,
    }
    project = load_project(write_project(config))
    assert project.warnings == ()
    assert project.training == load_project(write_project()).training


@pytest.mark.parametrize("key", ["disable_benchmark", "flux_guidance_mode", "max_workers", "--disable_tf32"])
def test_keys_without_meaning_are_named_in_a_warning(write_project, key):
    (warning,) = load_project(write_project({key: True})).warnings
    assert key in warning


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [(TrainingSettings, TRAINING), (ImageDataset, IMAGES), (TextEmbedsDataset, TEXT_EMBEDS)],
)
def test_no_key_is_two_things(model, vocabulary):
    kinds = [
        set(model.model_fields),
        set(vocabulary.spellings),
        set(vocabulary.later),
        set(vocabulary.idle),
        vocabulary.meaningless,
    ]
    for position, kind in enumerate(kinds):
        for other in kinds[position + 1 :]:
            assert kind & other == set()
    assert [key for key in model.model_fields if vocabulary.is_meaningless(key)] == []
    known = kinds[0] | kinds[2]
    # a switch that works here may be on, and what it does not tune would then be passed over without a word
    assert set(vocabulary.idle.values()) <= kinds[2] | {"type"}
    assert set(vocabulary.spellings.values()) <= known
    assert set(vocabulary.later_values) <= set(model.model_fields)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lora_rank", 0, "must be at least 1"),
        ("lora_rank", "many", "must be a whole number"),
        ("lora_rank", 1.5, "must be a whole number"),
        ("lora_rank", True, "must be a number, not true or false"),
        ("learning_rate", [1], "must be a number"),
        ("push_to_hub", "perhaps", "must be true or false"),
        ("validation_prompt", 3, "must be text"),
        ("mixed_precision", "fp8", "fp8 is not available yet"),
        ("mixed_precision", "BF16", "is not one of the known values"),
        ("model_family", "flux", "this project trains Stable Diffusion XL"),
        ("report_to", "wandbb", "is not one of the known values"),
        ("validation_resolution", "100x100", "100x100 is not a multiple of 8 on both edges"),
        ("aspect_bucket_alignment", 60, "must be a multiple of 8"),
    ],
)
def test_wrong_values_are_told_in_words(problems_of, key, value, words):
    problem = problems_of({key: value})[key]
    assert words in problem.message
    assert "pydantic" not in str(problem)


WRONG = {"nobody": {"knows": ["this"]}}
INLINE = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 1}


@pytest.mark.parametrize("value", [WRONG, [WRONG], 5.5, -7, "\x00", True, None, {}])
@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [(TrainingSettings, TRAINING), (ImageDataset, IMAGES), (TextEmbedsDataset, TEXT_EMBEDS)],
)
def test_no_value_of_any_key_is_more_than_a_problem(model, vocabulary, value):
    for key in model.model_fields:
        for problem in parse_settings({key: value}, model, vocabulary, Path("config.json")).problems:
            assert problem.message
            assert "pydantic" not in str(problem)


@pytest.mark.parametrize(
    ("changes", "key", "words", "hint"),
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
            "Attention: factr is not known there",
            "factor",
        ),
    ],
)
def test_a_mistake_in_an_object_that_might_be_a_path_is_told_at_its_place(
    problems_of, changes, key, words, hint
):
    (problem,) = problems_of({"lora_type": "lycoris", "lycoris_config": {**INLINE, **changes}}).values()
    assert problem.key == key
    assert words in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize("value", [["a"], 5])
def test_what_is_neither_an_object_nor_a_path_is_told(problems_of, value):
    (problem,) = problems_of({"lora_type": "lycoris", "lycoris_config": value}).values()
    assert problem.key == "lycoris_config"
    assert "must be an object" in problem.message
