"""Holds: what dataset entries take over from config.json, and which entries and combinations are refused."""

import pytest

from sdxl_pipeline.project.project import load_project
from tests.project.conftest import PICTURES


def only_dataset(folder):
    (dataset,) = load_project(folder).datasets
    return dataset


def test_entries_take_over_what_they_do_not_say(write_project):
    config = {
        "resolution": 768,
        "minimum_image_size": 512,
        "caption_strategy": "instance_prompt",
        "instance_prompt": "a cat",
        "aspect_bucket_alignment": 32,
    }
    entry = {**PICTURES, "minimum_image_size": 640}
    dataset = only_dataset(write_project(config, [entry]))
    assert (dataset.resolution, dataset.resolution_type, dataset.minimum_image_size) == (
        768,
        "pixel_area",
        640,
    )
    assert (dataset.caption_strategy, dataset.instance_prompt) == ("instanceprompt", "a cat")
    assert dataset.aspect_bucket_alignment == 32


def test_sizes_in_another_unit_are_not_taken_over(write_project):
    config = {"resolution": 768, "minimum_image_size": 512}
    project = load_project(write_project(config, [{**PICTURES, "resolution_type": "area"}]))
    (dataset,) = project.datasets
    assert (dataset.resolution, dataset.minimum_image_size) == (1.0, 0.0)
    assert len(project.warnings) == 2
    assert all("config.json" in warning for warning in project.warnings)


@pytest.mark.parametrize("spelling", ["disabled", "disable", "--disabled"])
def test_disabled_entries_are_left_out_unread(write_project, spelling):
    off = {"id": "off", "type": "aws", "nonsense": 1, spelling: "true"}
    assert only_dataset(write_project({}, [PICTURES, off])).id == "cats"


def test_eval_datasets_are_kept_apart(write_project):
    project = load_project(write_project({}, [PICTURES, {**PICTURES, "id": "held", "dataset_type": "eval"}]))
    assert [dataset.id for dataset in project.train_datasets] == ["cats"]
    assert [dataset.id for dataset in project.eval_datasets] == ["held"]


def test_text_embeds_are_found_by_name_then_default(write_project):
    entries = [
        PICTURES,
        {**PICTURES, "id": "dogs", "text_embeds": "first"},
        {"id": "first", "dataset_type": "text_embeds"},
        {"id": "second", "dataset_type": "text_embeds", "default": True},
    ]
    project = load_project(write_project({"write_batch_size": 7}, entries))
    cats, dogs = project.datasets
    assert project.text_embeds_of(cats).id == "second"
    assert project.text_embeds_of(dogs).id == "first"
    assert project.text_embeds_of(cats).write_batch_size == 7


def test_without_a_text_embeds_entry_one_is_made(write_project):
    project = load_project(write_project())
    assert project.text_embeds_of(project.datasets[0]).cache_dir is None


@pytest.mark.parametrize(
    ("entries", "key", "words"),
    [
        ([PICTURES, PICTURES], '[2] "cats".id', 'already that of entry [1] "cats"'),
        ([{**PICTURES, "id": "a-b"}, {**PICTURES, "id": "a_b"}], '[2] "a_b".id', "a_b"),
        (
            [
                PICTURES,
                {"id": "t", "dataset_type": "text_embeds", "default": True},
                {"id": "u", "dataset_type": "text_embeds", "default": True},
            ],
            '[3] "u".default',
            '[2] "t" is the default already',
        ),
        ([{**PICTURES, "text_embeds": "nobody"}], '[1] "cats".text_embeds', "names no text_embeds entry"),
        ([{**PICTURES, "dataset_type": "eval"}], "", "no pictures to train on"),
        ([{"instance_data_dir": "data"}], "[1].id", "is missing"),
        ([{"id": "cats"}], '[1] "cats".instance_data_dir', "is missing"),
        ([PICTURES, 3], "[2]", "a number, not an object"),
        ({"id": "cats"}, "", "an object, not a list"),
        ([{**PICTURES, "dataset_type": "video"}], '[1] "cats".dataset_type', "not for SDXL LoRA yet"),
        ([{**PICTURES, "dataset_type": "images"}], '[1] "cats".dataset_type', "not a known dataset_type"),
        ([{"id": "cats", "type": "huggingface"}], '[1] "cats".type', "not available yet"),
        ([{**PICTURES, "type": "locale"}], '[1] "cats".type', "not one of the known values"),
        ([{**PICTURES, "crop_aspect": "closest"}], '[1] "cats".crop_aspect', "not available yet"),
        ([{**PICTURES, "vae_cache_ondemand": True}], '[1] "cats".vae_cache_ondemand', "not available yet"),
        (
            [{**PICTURES, "delete_unwanted_images": True}],
            '[1] "cats".delete_unwanted_images',
            "not available yet",
        ),
        ([{**PICTURES, "caption_strategy": "parquet"}], '[1] "cats".caption_strategy', "not available yet"),
        ([{**PICTURES, "skip_file_discovery": "vae, txet"}], '[1] "cats".skip_file_discovery', "txet"),
        ([{**PICTURES, "caption_strategy": "instanceprompt"}], '[1] "cats".instance_prompt', "needs it"),
        ([{**PICTURES, "prepend_instance_prompt": True}], '[1] "cats".instance_prompt', "needs it"),
        (
            [{**PICTURES, "maximum_image_size": 1024}],
            '[1] "cats".maximum_image_size',
            "without target_downsample_size",
        ),
        (
            [{**PICTURES, "target_downsample_size": 1024}],
            '[1] "cats".target_downsample_size',
            "without maximum_image_size",
        ),
        (
            [{**PICTURES, "maximum_image_size": 1024, "target_downsample_size": 2048}],
            '[1] "cats".target_downsample_size',
            "above maximum_image_size",
        ),
        (
            [{**PICTURES, "resolution_type": "area", "resolution": 1, "minimum_image_size": 512}],
            '[1] "cats".minimum_image_size',
            "would be megapixels",
        ),
        (
            [{**PICTURES, "resolution_type": "area", "resolution": 1024}],
            '[1] "cats".resolution',
            "would be megapixels",
        ),
        ([{**PICTURES, "resolution": 1.0}], '[1] "cats".resolution', "would be pixels"),
        (
            [{**PICTURES, "resolution_type": "pixel", "resolution": 1.0}],
            '[1] "cats".resolution',
            "would be pixels",
        ),
        ([{**PICTURES, "minimum_image_size": 0.25}], '[1] "cats".minimum_image_size', "would be pixels"),
        (
            [{**PICTURES, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}],
            '[1] "cats".minimum_aspect_ratio',
            "above maximum_aspect_ratio",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(problems_of, entries, key, words):
    problems = problems_of({}, entries)
    assert list(problems) == [key]
    assert words in problems[key].message
    assert problems[key].file.name == "multidatabackend.json"


def test_a_value_taken_over_is_a_problem_of_the_file_it_stands_in(problems_of):
    problem = problems_of({"resolution": 1.0})["resolution"]
    assert problem.file.name == "config.json"


def test_remedies_for_sizes_in_the_wrong_unit_give_the_size_that_was_meant(problems_of):
    entry = {**PICTURES, "resolution_type": "area", "resolution": 1024}
    assert "such as 1," in problems_of({}, [entry])['[1] "cats".resolution'].remedy
    assert (
        "such as 1000," in problems_of({}, [{**PICTURES, "resolution": 1.0}])['[1] "cats".resolution'].remedy
    )


def test_lengths_that_contradict_each_other_are_refused(problems_of):
    config = {"max_train_steps": 10, "num_train_epochs": 2, "lr_warmup_steps": 11}
    assert set(problems_of(config)) == {"num_train_epochs", "lr_warmup_steps"}


def test_warm_up_without_effect_is_named(write_project):
    project = load_project(write_project({"lr_scheduler": "constant", "lr_warmup_steps": 5}))
    (warning,) = project.warnings
    assert "constant_with_warmup" in warning


def test_skipping_file_discovery_is_named_as_without_effect(write_project):
    project = load_project(write_project({}, [{**PICTURES, "skip_file_discovery": "vae metadata"}]))
    (warning,) = project.warnings
    assert '[1] "cats".skip_file_discovery has no effect yet' in warning
