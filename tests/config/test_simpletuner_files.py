"""Files like SimpleTuner's examples: every key is applied, reported as a warning, or reported as a problem."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_settings
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.simpletuner_schema import TRAINING
from tests.config.conftest import IMAGE_ENTRY

# the keys and values of SimpleTuner's config.json.example, but for the model, which is SDXL here
CONFIG_EXAMPLE = {
    "--resume_from_checkpoint": "latest",
    "--data_backend_config": "config/multidatabackend.json",
    "--aspect_bucket_rounding": 2,
    "--seed": 42,
    "--minimum_image_size": 0,
    "--output_dir": "output/models",
    "--lora_type": "lycoris",
    "--lycoris_config": {"algo": "lokr", "apply_preset": {"target_module": ["Attention"]}},
    "--max_train_steps": 10000,
    "--num_train_epochs": 0,
    "--checkpoint_step_interval": 500,
    "--checkpoints_total_limit": 5,
    "--hub_model_id": "simpletuner-lora",
    "--push_to_hub": "true",
    "--push_checkpoints_to_hub": "true",
    "--tracker_project_name": "lora-training",
    "--tracker_run_name": "simpletuner-lora",
    "--model_type": "lora",
    "--model_family": "sdxl",
    "--train_batch_size": 1,
    "--gradient_checkpointing": "true",
    "--caption_dropout_probability": 0.1,
    "--resolution_type": "pixel_area",
    "--resolution": 1024,
    "--validation_seed": 42,
    "--validation_step_interval": 500,
    "--validation_resolution": "1024x1024",
    "--validation_guidance": 3.0,
    "--validation_guidance_rescale": "0.0",
    "--validation_num_inference_steps": "20",
    "--validation_prompt": "A photo-realistic image of a cat",
    "--mixed_precision": "bf16",
    "--optimizer": "adamw_bf16",
    "--learning_rate": "1e-4",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
    "--validation_torch_compile": "false",
    "--disable_benchmark": "false",
}


def test_load_project_config_example_loads_with_expected_warnings(write_project):
    project = load_project(write_project(CONFIG_EXAMPLE))
    assert project.training.push_checkpoints_to_hub is True
    assert {warning.split(" ")[1] for warning in project.warnings} == {
        "data_backend_config",
        "--validation_torch_compile",
        "--disable_benchmark",
    }


@pytest.mark.parametrize("off", [False, "false", None, "", []])
def test_load_project_skip_file_discovery_false_is_off(write_project, off):
    texts = {"id": "texts", "dataset_type": "text_embeds", "skip_file_discovery": off}
    project = load_project(
        write_project({"skip_file_discovery": off}, [{**IMAGE_ENTRY, "skip_file_discovery": off}, texts])
    )
    assert project.training.skip_file_discovery == ""
    assert project.datasets[0].skipped_stages == frozenset()
    assert project.text_embeds[0].skip_file_discovery == ""


def test_load_project_skip_file_discovery_list_and_true(write_project, problems_of):
    entry = {**IMAGE_ENTRY, "skip_file_discovery": ["vae", "text"]}
    assert load_project(write_project({}, [entry])).datasets[0].skipped_stages == {"vae", "text"}
    assert "must be text" in problems_of({"skip_file_discovery": True})["skip_file_discovery"].message


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit", None),
        ({"max_train_steps": "1e4"}, "max_train_steps", 10000),
        ({"train_batch_size": "4.0"}, "train_batch_size", 4),
        ({"seed": "9007199254740993"}, "seed", None),
        ({"maximum_image_size": 0}, "maximum_image_size", None),
        ({"init_lora": False, "webhook_config": False}, "init_lora", None),
        ({"report_to": "none"}, "report_to", ()),
        ({"attention_mechanism": "flash-attn"}, "attention_mechanism", "flash-attn-2"),
    ],
)
def test_load_project_value_of_another_type_is_converted(write_project, problems_of, config, key, value):
    if key == "seed":
        assert "must be below 4.29497e+09" in problems_of(config)["seed"].message
        return
    assert getattr(load_project(write_project(config)).training, key) == value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"--xformers": True}, "scaled_dot_product_attention"),
        ({"enable_xformers_memory_efficient_attention": "true"}, "scaled_dot_product_attention"),
        ({"--allow_tf32": "true"}, "mixed_precision"),
        ({"trust_remote_code": True}, "never run here"),
        ({"model_type": "full", "lora_rank": 16}, "lora_rank has no effect with model_type full"),
        ({"model_type": "full", "lora_type": "lycoris", "lycoris_config": "gone.json"}, "lycoris_config"),
        ({"push_checkpoints_to_hub": True}, "push_to_hub is false"),
    ],
)
def test_load_project_setting_without_effect_is_a_warning_with_the_reason(write_project, config, message):
    project = load_project(write_project(config))
    assert any(message in warning for warning in project.warnings)
    assert project.training.lora_rank == 16
    assert project.training.lora_type == "standard"
    off = {"model_type": "lora"} if "model_type" in config else dict.fromkeys(config, False)
    assert not [warning for warning in load_project(write_project(off)).warnings if message in warning]


def test_load_project_init_lora_with_model_type_full_is_a_problem(problems_of):
    problems = problems_of({"model_type": "full", "init_lora": "someone/lora", "lora_rank": 32})
    assert set(problems) == {"init_lora"}


def test_load_project_remote_text_embeds_become_local_with_a_warning(write_project):
    bucket = {"type": "aws", "aws_bucket_name": "texts", "aws_data_prefix": "", "cache_dir": "prefix"}
    texts = {"id": "texts", "dataset_type": "text_embeds", "default": True, **bucket}
    project = load_project(write_project({}, [IMAGE_ENTRY, texts]))
    (warning,) = project.warnings
    assert '"texts".type aws has no effect: embeddings are stored on this machine' in warning
    assert project.text_embeds[0].cache_dir is None


HUB = {"id": "cats", "type": "huggingface", "metadata_backend": "huggingface"}


def test_load_project_nested_huggingface_object_sets_columns(write_project):
    nested = {"dataset_name": "someone/cats", "image_column": "Image", "caption_column": ["Caption", "tags"]}
    unread = {"file_extension": "jpg", "num_proc": 4}
    project = load_project(
        write_project({}, [{**HUB, "image_column": "photo", "huggingface": nested | unread}])
    )
    (dataset,) = project.datasets
    assert (dataset.dataset_name, dataset.image_column) == ("someone/cats", "photo")
    assert dataset.caption_column == ("Caption", "tags")
    assert [warning.split(" ")[2] for warning in project.warnings] == [
        '"cats".huggingface.file_extension',
        '"cats".huggingface.num_proc',
    ]
    (warning,) = load_project(write_project({}, [{**IMAGE_ENTRY, "huggingface": nested}])).warnings
    assert "huggingface has no effect with another type" in warning


@pytest.mark.parametrize("key", ["filter_func", "composite_image_config", "fallback_caption_column"])
def test_load_project_filter_in_the_huggingface_object_is_a_problem(problems_of, key):
    entry = {**HUB, "huggingface": {"dataset_name": "someone/cats", key: {"a": 1}}}
    problem = problems_of({}, [entry])[f'[1] "cats".huggingface.{key}']
    assert problem.message == "is not supported"


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("start_step", 100, "from the first step to the last"),
        ("end_step", 100, "from the first step to the last"),
        ("start_epoch", 2, "from the first step to the last"),
        ("train_batch_size", 2, "config.json"),
        ("filter_func", {"a": 1}, "rows are not filtered here"),
    ],
)
def test_load_project_dataset_schedule_is_a_problem(problems_of, key, value, hint):
    problem = problems_of({}, [{**IMAGE_ENTRY, key: value}])[f'[1] "cats".{key}']
    assert problem.message == "is not supported"
    assert hint in problem.hint


def test_load_project_uniform_sampling_is_a_problem_and_auto_weighting_is_accepted(
    problems_of, write_project
):
    problem = problems_of({"data_backend_sampling": "uniform"})["data_backend_sampling"]
    assert "probability that is inverse to its number of images" in problem.hint
    assert load_project(write_project({"data_backend_sampling": "auto-weighting"})).warnings == ()


def test_load_project_leading_spacing_with_zero_snr_is_a_problem(problems_of):
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    problem = problems_of({**config, "inference_scheduler_timestep_spacing": "leading"})
    assert "pure noise" in problem["inference_scheduler_timestep_spacing"].message


@pytest.mark.parametrize("name", ["foo", "flash-attn-3-hub", "sageattention", "cudnn", "native-flash", "sla"])
def test_load_project_unknown_attention_hint_lists_the_four_kernels(problems_of, name):
    problem = problems_of({"attention_mechanism": name})["attention_mechanism"]
    assert name in problem.message
    assert 'one of "diffusers", "xformers", "flash-attn-2", "flex"' in problem.hint


def test_load_project_tlora_does_not_suggest_lora(problems_of, write_project):
    config = {"lora_type": "lycoris", "lycoris_config": {"algo": "tlora"}}
    problem = problems_of(config)["lycoris_config.algo"]
    assert problem.message == "tlora is not supported"
    assert problem.hint == 'write one of "lokr", "loha", "lora", "locon"'


def test_load_project_visible_devices_hint_contains_the_profile_field(problems_of):
    problem = problems_of({"accelerate_visible_devices": "0,1"})["accelerate_visible_devices"]
    assert "num_processes of the hardware profile" in problem.hint
    assert "CUDA_VISIBLE_DEVICES" in problem.hint


def resolve_problem(write_project, config, profile, overrides):
    project = load_project(write_project(config))
    with pytest.raises(ProjectError) as caught:
        resolve_settings(project.training, PRESETS[profile], overrides, project.folder)
    (problem,) = caught.value.problems
    return project.folder, problem


@pytest.mark.parametrize(
    ("config", "overrides", "file", "key"),
    [
        ({"attention_mechanism": "xformers"}, {}, "config.json", "attention_mechanism"),
        ({"mixed_precision": "fp16"}, {}, "config.json", "mixed_precision"),
        ({}, {"mixed_precision": "fp16"}, "launchpad", "mixed_precision"),
        ({"lr_warmup_steps": 50}, {"max_train_steps": 10}, "config.json", "lr_warmup_steps"),
        ({"max_train_steps": 10}, {"lr_warmup_steps": 50}, "launchpad", "lr_warmup_steps"),
        ({"lr_scheduler": "cosine"}, {"optimizer": "adamw_schedulefree"}, "config.json", "lr_scheduler"),
    ],
)
def test_resolve_settings_problem_contains_the_source_of_its_value(
    write_project, config, overrides, file, key
):
    folder, problem = resolve_problem(write_project, config, "cpu", overrides)
    assert problem.file.name == file
    assert problem.file.parent == (folder if file == "config.json" else problem.file.parent)
    assert problem.key == key


def test_resolve_settings_conflict_with_profile_value_contains_it(write_project):
    _, problem = resolve_problem(write_project, {"optimizer": "adamw_bf16"}, "cpu", {})
    assert (problem.key, problem.file.name) == ("optimizer", "config.json")
    assert "mixed_precision is no" in problem.message


DEFAULTS = json.loads(Path(__file__).with_name("simpletuner_defaults.json").read_text(encoding="utf-8"))
"""The default of each key, as in the settings registry of SimpleTuner 4.8, for supported keys."""
PAGE = Path(__file__).parents[2] / "docs/from-simpletuner.md"


def differing_defaults() -> dict[str, tuple[Any, Any]]:
    """Return (SimpleTuner's default, own default) of each key of config.json whose default means something else."""
    defaults = TrainingSettings()
    differing = {}
    for written, default in DEFAULTS["config.json"].items():
        key = TRAINING.spellings.get(written, written)
        own = getattr(defaults, key) or None if getattr(defaults, key) in ((), {}) else getattr(defaults, key)
        simpletuner = (
            default if default is None else getattr(TrainingSettings.model_validate({key: default}), key)
        )
        if (None if simpletuner in ((), {}) else simpletuner) != own:
            differing[written] = (default, own)
    return differing


def test_training_defaults_that_differ_from_simpletuner_are_documented():
    rows = re.findall(
        r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|.*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    declared = {
        key: (json.loads(simpletuner), json.loads(defaults))
        for key, simpletuner, defaults in rows
        if is_json(simpletuner, defaults)
    }
    expected = {
        key: (simpletuner, list(own) if isinstance(own, tuple) else own)
        for key, (simpletuner, own) in differing_defaults().items()
    }
    assert declared == expected


def is_json(*texts: str) -> bool:
    try:
        return all(json.loads(text) is not ... for text in texts)
    except ValueError:
        return False


def test_dataset_defaults_equal_simpletuners():
    fields = ImageDataset.model_fields
    differing = {
        key: fields[key].default
        for key, default in DEFAULTS["multidatabackend.json"].items()
        if fields[key].default != default
    }
    assert differing == {}


def test_every_key_of_simpletuner_defaults_is_supported():
    known = {*TrainingSettings.model_fields, *TRAINING.spellings}
    assert set(DEFAULTS["config.json"]) <= known
    assert len(DEFAULTS["config.json"]) > 120
