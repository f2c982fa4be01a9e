"""Precedence of run config, config.json, hardware profile and default, and the source of each value."""

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_hardware, resolve_settings
from sdxl_pipeline.config.schema.training import PROFILE_KEYS, TrainingSettings

CPU, CARD = PRESETS["cpu"], PRESETS["cuda-24gb"]


def test_resolve_settings_precedence_is_run_config_file_profile_default():
    training = TrainingSettings.model_validate({"mixed_precision": "no", "vae_batch_size": 3, "lora_rank": 8})
    settings, sources = resolve_settings(training, CARD, {"--vae_batch_size": "5"})
    assert (settings.vae_batch_size, sources["vae_batch_size"]) == (5, "launchpad")
    assert (settings.mixed_precision, sources["mixed_precision"]) == ("no", "config.json")
    assert (settings.lora_rank, sources["lora_rank"]) == (8, "config.json")
    assert (settings.vae_dtype, sources["vae_dtype"]) == (CARD.vae_dtype, "hardware profile cuda-24gb")
    assert (settings.learning_rate, sources["learning_rate"]) == (1e-4, "default")
    assert sources.keys() == TrainingSettings.model_fields.keys()


@pytest.mark.parametrize("hardware", PRESETS.values(), ids=PRESETS)
def test_resolve_settings_sets_every_profile_key(hardware):
    settings, _ = resolve_settings(TrainingSettings(), hardware, {})
    assert {key: getattr(settings, key) for key in PROFILE_KEYS} == hardware.model_dump(
        include=set(PROFILE_KEYS)
    )
    assert resolve_hardware(settings, hardware) == hardware


def test_resolve_settings_null_uses_the_profile():
    training = TrainingSettings.model_validate({"mixed_precision": None})
    settings, sources = resolve_settings(training, CARD, {"mixed_precision": "none"})
    assert settings.mixed_precision == "bf16"
    assert sources["mixed_precision"] == "hardware profile cuda-24gb"


@pytest.mark.parametrize(
    ("config", "overrides", "steps", "epochs", "sources"),
    [
        ({"num_train_epochs": 5}, {"max_train_steps": 20}, 20, None, ("launchpad", "default")),
        ({"max_train_steps": 20}, {"num_train_epochs": 5}, None, 5, ("default", "launchpad")),
        ({"max_train_steps": 20, "num_train_epochs": 0}, {}, 20, None, ("config.json", "default")),
        ({}, {}, None, 1, ("default", "default")),
        ({}, {"max_train_steps": 20}, 20, None, ("launchpad", "default")),
    ],
)
def test_resolve_settings_length_is_set_by_one_source(config, overrides, steps, epochs, sources):
    settings, reported = resolve_settings(TrainingSettings.model_validate(config), CPU, overrides)
    assert (settings.max_train_steps, settings.num_train_epochs) == (steps, epochs)
    assert (reported["max_train_steps"], reported["num_train_epochs"]) == sources


def test_resolve_settings_preserves_values_completed_by_the_loader(write_project):
    project = load_project(write_project({"push_to_hub": True}))
    settings, sources = resolve_settings(project.training, CPU, {"seed": 1})
    assert settings.output_dir == str(project.folder / "output")
    assert settings.hub_model_id == "cat_lora"
    assert (sources["output_dir"], sources["push_to_hub"], sources["seed"]) == (
        "default",
        "config.json",
        "launchpad",
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"lora_rnk": 4}, "lora_rnk"),
        ({"lora_rank": "x"}, "lora_rank"),
        ({"fsdp_enable": True}, "fsdp_enable"),
        ({"resolution": 512}, "resolution"),
        ({"--validation_prompt": "x"}, "--validation_prompt"),
        ({"max_train_steps": 3, "lr_warmup_steps": 4}, "lr_warmup_steps"),
    ],
)
def test_resolve_settings_invalid_override_is_a_problem_of_the_run_config(overrides, key):
    with pytest.raises(ProjectError) as caught:
        resolve_settings(TrainingSettings(), CPU, overrides)
    (problem,) = caught.value.problems
    assert (problem.file.name, problem.key) == ("launchpad", key)


def test_resolve_hardware_unsupported_setting_is_a_problem():
    with pytest.raises(ProjectError, match="fp16"):
        resolve_settings(TrainingSettings(mixed_precision="fp16"), CPU, {})
    assert resolve_settings(TrainingSettings(mixed_precision="fp16"), CARD, {})[0].mixed_precision == "fp16"


def test_resolve_settings_invalid_profile_value_is_a_problem_of_the_profile():
    hardware = CARD.model_copy(update={"attention_mechanism": "sageattention"})
    with pytest.raises(
        ProjectError, match=r"hardware profile cuda-24gb: attention_mechanism = \"sageattention\""
    ):
        resolve_settings(TrainingSettings(), hardware, {})


def test_resolve_hardware_contains_the_values_of_config_json():
    hardware = resolve_hardware(TrainingSettings(vae_batch_size=3, vae_dtype="fp32"), CARD)
    assert (hardware.vae_batch_size, hardware.vae_dtype) == (3, "fp32")
    assert hardware.text_encoder_batch_size == CARD.text_encoder_batch_size


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretrained_model_name_or_path", "owner/other"),
        ("--model_flavour", "base-1.0"),
        ("push_to_hub", True),
        ("validation_prompt_library", True),
        ("tokenizer_max_length", 154),
        ("evaluation_type", "none"),
    ],
)
def test_resolve_settings_not_overridable_key_is_a_problem(write_project, key, value):
    project = load_project(write_project())
    with pytest.raises(ProjectError) as caught:
        resolve_settings(project.training, PRESETS["cpu"], {key: value})
    (problem,) = caught.value.problems
    assert problem.key == key
    assert "config.json" in problem.hint
