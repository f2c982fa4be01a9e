"""The quickstart's files load unchanged, all problems of both files are reported at once, and invalid projects do not affect others."""

import json
import os
import re
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from sdxl_pipeline.config.loader import (
    PROJECTS_VARIABLE,
    InvalidProject,
    Project,
    Prompt,
    discover_projects,
    load_project,
)
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.schema.datasets import asset_name
from tests.config.conftest import IMAGE_ENTRY, QUICKSTART_CONFIG, QUICKSTART_DATASETS

NAMES_IN_OTHER_LETTERS = ("猫", "毛", "кот", "кот v2", "кот-v2", "Ärger", "🟫")


def test_discover_projects_non_ascii_names_are_transliterated_and_unique(write_project):
    for name in NAMES_IN_OTHER_LETTERS:
        folder = write_project({}, name=name)
    projects = discover_projects(folder.parent)
    assert all(isinstance(project, Project) for project in projects)
    names = {project.folder.name: project.name for project in projects}
    assert len(set(names.values())) == len(NAMES_IN_OTHER_LETTERS)
    assert all(re.fullmatch("[A-Za-z0-9_]+", name) for name in names.values())
    assert names["кот v2"].startswith("kot_v2_")
    assert asset_name("Årgang") == asset_name("A\u030argang")  # as macOS spells it
    assert asset_name("dog-lora v2.1") == "dog_lora_v2_1"


def test_discover_projects_non_utf8_folder_name_does_not_affect_other_folders(write_project):
    good = write_project(name="good")
    write_project(name="bad").rename(good.parent / os.fsdecode(b"bad\xff"))
    bad, other = discover_projects(good.parent)
    assert isinstance(bad, InvalidProject)
    assert isinstance(other, Project)
    assert "name is not UTF-8" in str(bad.error).encode().decode()  # can be encoded
    assert bad.folder.name == r"bad\xff"


def test_load_project_non_ascii_dataset_ids_have_unique_asset_names(write_project):
    entries = [{"id": name, "instance_data_dir": "data"} for name in NAMES_IN_OTHER_LETTERS]
    project = load_project(write_project({}, entries))
    assert len({dataset.asset_name for dataset in project.datasets}) == len(entries)


def test_discover_projects_duplicate_name_does_not_affect_other_folders(write_project):
    for name in ("dog x", "dog-x", "dog_x_2"):
        folder = write_project({}, name=name)
    names = {
        project.folder.name: (project.name, type(project)) for project in discover_projects(folder.parent)
    }
    assert names == {
        "dog x": ("dog_x", Project),
        "dog-x": ("dog_x_3", InvalidProject),
        "dog_x_2": ("dog_x_2", Project),
    }


@pytest.mark.parametrize("name", ["lora.", "a--b", "a..b", "dog.git", "a" * 97, "a/b/c", "/a", "a b", "ä"])
def test_load_project_invalid_hub_model_id_is_a_problem(problems_of, name):
    problem = problems_of({"push_to_hub": True, "hub_model_id": name})["hub_model_id"]
    assert "is not a valid Hub repository name" in problem.message
    assert "your-name/cat-lora" in problem.hint


@pytest.mark.parametrize("name", ["dog -- v2", "lora.", "dog.git", "a.git.git", "a" * 97, "猫", "...", "_x_"])
def test_load_project_default_hub_model_id_is_valid(write_project, name):
    written = load_project(write_project({"push_to_hub": True}, name=name)).training.hub_model_id
    validate_repo_id(written)


def test_load_project_quickstart_files_load_unchanged(write_project):
    folder = write_project(QUICKSTART_CONFIG, QUICKSTART_DATASETS)
    project = load_project(folder)
    assert project.warnings == ()
    training = project.training
    assert training.gradient_checkpointing is True
    assert training.learning_rate == 1e-4
    assert training.validation_guidance == 3.4
    assert training.validation_sizes == ((1024, 1024), (768, 1280))
    assert training.output_dir == "/home/user/output/models"
    assert training.num_train_epochs == 1
    (images,) = project.train_datasets
    assert images.instance_data_dir == Path("/home/user/simpletuner/datasets/pseudo-camera-10k")
    assert (images.resolution, images.resolution_type, images.minimum_image_size) == (1.0, "area", 0.25)
    assert (images.crop, images.crop_style, images.crop_aspect) == (True, "random", "square")
    assert images.cache_dir_vae == folder / "cache/vae/sdxl/pseudo-camera-10k"
    assert project.text_embeds_of(images).cache_dir == folder / "cache/text/sdxl/pseudo-camera-10k"


def test_load_project_quickstart_quantized_settings_load(write_project):
    pytest.importorskip("optimi", reason="needs the extra `optimizers`")
    config = {
        "base_model_precision": "int8-quanto",
        "text_encoder_1_precision": "no_change",
        "text_encoder_2_precision": "no_change",
        "optimizer": "optimi-lion",
    }
    training = load_project(write_project(config)).training
    assert (training.base_model_precision, training.optimizer) == ("int8-quanto", "optimi-lion")


def test_load_project_reports_all_problems_of_both_files(write_project):
    folder = write_project(
        {"learning_rat": 1e-4, "lora_rank": "many", "optimizer": "soap", "--seed": -1},
        [{"id": "cats", "instance_data_dir": "data", "crop_style": "middle", "repeats": -1, "croop": True}],
    )
    with pytest.raises(ProjectError) as caught:
        load_project(folder)
    problems = {(problem.file.name, problem.key, problem.value) for problem in caught.value.problems}
    assert problems == {
        ("config.json", "learning_rat", 1e-4),
        ("config.json", "lora_rank", "many"),
        ("config.json", "optimizer", "soap"),
        ("config.json", "--seed", -1),
        ("multidatabackend.json", '[1] "cats".crop_style', "middle"),
        ("multidatabackend.json", '[1] "cats".repeats', -1),
        ("multidatabackend.json", '[1] "cats".croop', True),
    }
    text = str(caught.value)
    assert text.startswith("7 problems:")
    assert (
        f"{folder}/config.json: learning_rat = 0.0001\n    is not a known key\n    -> write learning_rate"
        in text
    )
    assert (
        'crop_style = "middle"\n    is not one of the known values\n    -> write one of "random", "center", "corner", "face"'
        in text
    )


def test_load_project_resolves_paths_relative_to_the_folder(write_project):
    folder = write_project({"output_dir": "out", "logging_dir": "../logs"})
    project = load_project(folder)
    assert project.training.output_dir == str(folder / "out")
    assert project.training.logging_dir == str(folder.parent / "logs")
    assert project.datasets[0].instance_data_dir == folder / "data"


def test_load_project_missing_files_are_reported(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ProjectError) as caught:
        load_project(folder)
    assert [problem.file for problem in caught.value.problems] == [
        folder / "config.json",
        folder / "multidatabackend.json",
    ]
    assert all(problem.message == "the file does not exist" for problem in caught.value.problems)


def test_load_project_missing_data_backend_config_falls_back_with_a_warning(write_project):
    folder = write_project({"data_backend_config": "config/multidatabackend.json"})
    project = load_project(folder)
    assert project.training.data_backend_config == str(folder / "multidatabackend.json")
    (warning,) = project.warnings
    assert "config/multidatabackend.json" in warning


def test_load_project_reads_the_file_of_data_backend_config(write_project):
    folder = write_project({"data_backend_config": "lists/mine.json"})
    (folder / "lists").mkdir()
    (folder / "lists/mine.json").write_text(json.dumps([{**IMAGE_ENTRY, "id": "dogs"}]))
    assert [dataset.id for dataset in load_project(folder).datasets] == ["dogs"]


def test_load_project_prompts_contain_the_prompt_and_the_library(write_project):
    folder = write_project(
        {
            "validation_prompt": "a cat",
            "validation_negative_prompt": "blurry",
            "validation_prompt_library": "prompts.json",
        }
    )
    library = {"night": "a cat at night", "day": {"prompt": "a cat by day", "negative_prompt": ""}}
    (folder / "prompts.json").write_text(json.dumps(library))
    assert load_project(folder).prompts == (
        Prompt("validation", "a cat", "blurry"),
        Prompt("night", "a cat at night", "blurry"),
        Prompt("day", "a cat by day", ""),
    )


def test_load_project_bundled_prompts_follow_the_validation_prompt(write_project):
    folder = write_project(
        {
            "validation_prompt": "a cat",
            "validation_prompt_library": "true",
            "user_prompt_library": "prompts.json",
        }
    )
    (folder / "prompts.json").write_text(json.dumps({"night": "a cat at night"}))
    prompts = load_project(folder).prompts
    assert (prompts[0].name, prompts[-1].name) == ("validation", "night")
    assert len(prompts) > 8
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    (folder / "prompts.json").write_text(json.dumps({prompts[1].name: "a cat"}))
    with pytest.raises(ProjectError, match="is also the name of another validation prompt"):
        load_project(folder)


def test_load_project_eval_dataset_id_must_be_an_eval_dataset(write_project):
    tests = {**IMAGE_ENTRY, "id": "tests", "dataset_type": "eval"}
    training = load_project(write_project({"eval_dataset_id": "tests"}, [IMAGE_ENTRY, tests])).training
    assert training.eval_dataset_id == "tests"
    with pytest.raises(ProjectError, match=r"is the id of no eval dataset\n.*write one of tests"):
        load_project(
            write_project({"eval_dataset_id": IMAGE_ENTRY["id"]}, [IMAGE_ENTRY, tests], name="other")
        )


def test_load_project_validation_settings_without_effect_are_warnings(write_project):
    config = {
        "validation_preview": True,
        "webhook_reporting_interval": 5,
        "eval_steps_interval": 5,
        "eval_loss_disable": True,
    }
    warnings = "\n".join(load_project(write_project(config)).warnings)
    for key in ("validation_preview", "webhook_reporting_interval", "eval_steps_interval"):
        assert key in warnings


@pytest.mark.parametrize(
    ("library", "key"),
    [
        (None, ""),
        ("[1]", ""),
        ("{}", ""),
        ("{", ""),
        ('{"night": 3}', "night"),
        ('{"night": {"negative_prompt": "x"}}', "night"),
        ('{"night": {"prompt": "x", "negativ_prompt": "y"}}', "night.negativ_prompt"),
        ('{"validation": "x"}', "validation"),
    ],
)
def test_load_project_malformed_prompt_library_is_a_problem_of_its_file(write_project, library, key):
    folder = write_project({"validation_prompt": "a cat", "user_prompt_library": "prompts.json"})
    if library is not None:
        (folder / "prompts.json").write_text(library)
    with pytest.raises(ProjectError) as caught:
        load_project(folder)
    (problem,) = caught.value.problems
    assert (problem.file, problem.key) == (folder / "prompts.json", key)


def test_load_project_push_to_hub_without_id_uses_the_project_name(write_project):
    training = load_project(write_project({"push_to_hub": True}, name="My cat (1)")).training
    assert training.hub_model_id == "My-cat-1"
    assert load_project(write_project()).training.hub_model_id is None


def test_asset_name_is_a_valid_asset_key(write_project):
    project = load_project(write_project({}, [{**IMAGE_ENTRY, "id": "my cats/2024"}], name="cat-lora.v2"))
    assert project.name == "cat_lora_v2"
    assert project.datasets[0].asset_name == "my_cats_2024"


def test_load_project_id_too_long_for_a_folder_name_is_a_problem(write_project):
    with pytest.raises(ProjectError, match="must be of a length of at most 100"):
        load_project(write_project({}, [{**IMAGE_ENTRY, "id": "a" * 256}]))


def test_discover_projects_invalid_files_do_not_affect_other_projects(write_project):
    good = write_project(name="good")
    broken = write_project("{", name="broken")
    (good.parent / "notes").mkdir()
    found = discover_projects(good.parent)
    assert [(type(project), project.name, project.folder) for project in found] == [
        (InvalidProject, "broken", broken),
        (Project, "good", good),
    ]
    assert "line 1, column 2" in str(found[0].error)


def test_discover_projects_equal_asset_names_are_a_problem_of_the_second_folder(write_project):
    root = write_project(name="cat-1").parent
    write_project(name="cat_1")
    first, second = discover_projects(root)
    assert (type(first), first.name) == (Project, "cat_1")
    assert (type(second), second.name) == (InvalidProject, "cat_1_2")
    assert "cat-1" in str(second.error)


def test_projects_folder_is_read_from_the_environment(write_project, monkeypatch, tmp_path):
    root = write_project(name="good").parent
    monkeypatch.setenv(PROJECTS_VARIABLE, str(root))
    assert [project.name for project in discover_projects()] == ["good"]
    monkeypatch.setenv(PROJECTS_VARIABLE, str(tmp_path / "nowhere"))
    (missing,) = discover_projects()
    assert isinstance(missing, InvalidProject)
    assert PROJECTS_VARIABLE in str(missing.error)
