"""Values that dataset entries inherit from config.json, and invalid entries and combinations."""

import pytest

from sdxl_pipeline.config.loader import load_project
from tests.config.conftest import IMAGE_ENTRY


def only_dataset(folder):
    (dataset,) = load_project(folder).datasets
    return dataset


def test_entries_inherit_unset_keys_from_config(write_project):
    config = {
        "resolution": 768,
        "minimum_image_size": 512,
        "caption_strategy": "instance_prompt",
        "instance_prompt": "a cat",
        "aspect_bucket_alignment": 32,
    }
    entry = {**IMAGE_ENTRY, "minimum_image_size": 640}
    dataset = only_dataset(write_project(config, [entry]))
    assert (dataset.resolution, dataset.resolution_type, dataset.minimum_image_size) == (
        768,
        "pixel_area",
        640,
    )
    assert (dataset.caption_strategy, dataset.instance_prompt) == ("instanceprompt", "a cat")
    assert dataset.aspect_bucket_alignment == 32


def test_sizes_in_another_unit_are_not_inherited(write_project):
    config = {"resolution": 768, "minimum_image_size": 512}
    project = load_project(write_project(config, [{**IMAGE_ENTRY, "resolution_type": "area"}]))
    (dataset,) = project.datasets
    assert (dataset.resolution, dataset.minimum_image_size) == (1.0, 0.0)
    assert len(project.warnings) == 2
    assert all("config.json" in warning for warning in project.warnings)


@pytest.mark.parametrize("spelling", ["disabled", "disable", "--disabled"])
def test_disabled_entries_are_ignored_without_validation(write_project, spelling):
    off = {"id": "off", "type": "aws", "nonsense": 1, spelling: "true"}
    assert only_dataset(write_project({}, [IMAGE_ENTRY, off])).id == "cats"


def test_eval_datasets_are_separate_from_train_datasets(write_project):
    project = load_project(
        write_project({}, [IMAGE_ENTRY, {**IMAGE_ENTRY, "id": "held", "dataset_type": "eval"}])
    )
    assert [dataset.id for dataset in project.train_datasets] == ["cats"]
    assert [dataset.id for dataset in project.eval_datasets] == ["held"]


def test_text_embeds_of_selects_by_name_then_default(write_project):
    entries = [
        IMAGE_ENTRY,
        {**IMAGE_ENTRY, "id": "dogs", "text_embeds": "first"},
        {"id": "first", "dataset_type": "text_embeds"},
        {"id": "second", "dataset_type": "text_embeds", "default": True},
    ]
    project = load_project(write_project({"write_batch_size": 7}, entries))
    cats, dogs = project.datasets
    assert project.text_embeds_of(cats).id == "second"
    assert project.text_embeds_of(dogs).id == "first"
    assert project.text_embeds_of(cats).write_batch_size == 7


def test_text_embeds_of_without_entry_returns_a_default_one(write_project):
    project = load_project(write_project())
    assert project.text_embeds_of(project.datasets[0]).cache_dir is None


@pytest.mark.parametrize(
    ("entries", "key", "message"),
    [
        ([IMAGE_ENTRY, IMAGE_ENTRY], '[2] "cats".id', 'already that of entry [1] "cats"'),
        ([{**IMAGE_ENTRY, "id": "a-b"}, {**IMAGE_ENTRY, "id": "a_b"}], '[2] "a_b".id', "a_b"),
        (
            [
                IMAGE_ENTRY,
                {"id": "t", "dataset_type": "text_embeds", "default": True},
                {"id": "u", "dataset_type": "text_embeds", "default": True},
            ],
            '[3] "u".default',
            '[2] "t" is already the default',
        ),
        (
            [{**IMAGE_ENTRY, "text_embeds": "nobody"}],
            '[1] "cats".text_embeds',
            "is the id of no text_embeds entry",
        ),
        ([{**IMAGE_ENTRY, "dataset_type": "eval"}], "", "no images to train on"),
        ([{"instance_data_dir": "data"}], "[1].id", "is missing"),
        ([{"id": "cats"}], '[1] "cats".instance_data_dir', "is missing"),
        ([IMAGE_ENTRY, 3], "[2]", "a number, not an object"),
        ({"id": "cats"}, "", "an object, not a list"),
        ([{**IMAGE_ENTRY, "dataset_type": "video"}], '[1] "cats".dataset_type', "not supported for SDXL"),
        ([{**IMAGE_ENTRY, "dataset_type": "images"}], '[1] "cats".dataset_type', "not a known dataset_type"),
        ([{**IMAGE_ENTRY, "type": "webshart"}], '[1] "cats".type', "not supported"),
        ([{"id": "cats", "type": "huggingface"}], '[1] "cats".dataset_name', "type huggingface needs it"),
        ([{"id": "cats", "type": "aws"}], '[1] "cats".aws_bucket_name', "type aws needs it"),
        ([{"id": "cats", "type": "csv"}], '[1] "cats".csv_file', "type csv needs it"),
        ([{**IMAGE_ENTRY, "instance_data_dir": "s3://b/c"}], '[1] "cats".url', "type is local"),
        (
            [{"id": "cats", "type": "aws", "url": "b/c"}],
            '[1] "cats".url',
            "no protocol",
        ),
        (
            [{"id": "cats", "type": "aws", "url": "s3://b/c", "aws_bucket_name": "b"}],
            '[1] "cats".url',
            "together with aws_bucket_name",
        ),
        (
            [{"id": "cats", "type": "aws", "url": "s3://b", "aws_access_key_id": "AK"}],
            '[1] "cats".aws_secret_access_key',
            "the other part",
        ),
        ([{**IMAGE_ENTRY, "type": "locale"}], '[1] "cats".type', "not one of the known values"),
        (
            [{**IMAGE_ENTRY, "crop": True, "crop_aspect": "closest"}],
            '[1] "cats".crop_aspect_buckets',
            "crop_aspect closest needs it",
        ),
        (
            [{**IMAGE_ENTRY, "crop_aspect_buckets": [1.0, 0.5], "crop_aspect_weights": [1]}],
            '[1] "cats".crop_aspect_weights',
            "1 weights for 2",
        ),
        (
            [{**IMAGE_ENTRY, "crops_per_image": 2, "vae_cache_clear_each_epoch": True}],
            '[1] "cats".crops_per_image',
            "new crop in every epoch",
        ),
        (
            [{**IMAGE_ENTRY, "delete_unwanted_images": True}],
            '[1] "cats".delete_unwanted_images',
            "not supported",
        ),
        (
            [{**IMAGE_ENTRY, "huggingface": {"filter_func": {"a": 1}}}],
            '[1] "cats".huggingface.filter_func',
            "not supported",
        ),
        (
            [{**IMAGE_ENTRY, "caption_strategy": "webshart"}],
            '[1] "cats".caption_strategy',
            "not supported",
        ),
        (
            [{**IMAGE_ENTRY, "caption_strategy": "csv"}],
            '[1] "cats".caption_strategy',
            "a dataset of type csv",
        ),
        (
            [{**IMAGE_ENTRY, "caption_strategy": "huggingface"}],
            '[1] "cats".caption_strategy',
            "a dataset of type huggingface",
        ),
        ([{**IMAGE_ENTRY, "caption_strategy": "parquet"}], '[1] "cats".parquet', "parquet needs it"),
        ([{**IMAGE_ENTRY, "parquet": {}}], '[1] "cats".parquet.path', "is missing"),
        ([{**IMAGE_ENTRY, "parquet": "a.parquet"}], '[1] "cats".parquet', "must be an object"),
        (
            [{**IMAGE_ENTRY, "parquet": {"path": "a", "filename_colum": "f"}}],
            '[1] "cats".parquet.filename_colum',
            "not a known key",
        ),
        (
            [{**IMAGE_ENTRY, "caption_shuffle": {"enable": True, "count": 0}}],
            '[1] "cats".caption_shuffle.count',
            "at least 1",
        ),
        (
            [{**IMAGE_ENTRY, "caption_shuffle": {"split_on": "comm"}}],
            '[1] "cats".caption_shuffle.split_on',
            "not one of the known values",
        ),
        ([{**IMAGE_ENTRY, "caption_filter_list": 3}], '[1] "cats".caption_filter_list', "a path or a list"),
        ([{**IMAGE_ENTRY, "skip_file_discovery": "vae, txet"}], '[1] "cats".skip_file_discovery', "txet"),
        ([{**IMAGE_ENTRY, "caption_strategy": "instanceprompt"}], '[1] "cats".instance_prompt', "needs it"),
        ([{**IMAGE_ENTRY, "prepend_instance_prompt": True}], '[1] "cats".instance_prompt', "needs it"),
        (
            [{**IMAGE_ENTRY, "maximum_image_size": 1024}],
            '[1] "cats".maximum_image_size',
            "without target_downsample_size",
        ),
        (
            [{**IMAGE_ENTRY, "target_downsample_size": 1024}],
            '[1] "cats".target_downsample_size',
            "without maximum_image_size",
        ),
        (
            [{**IMAGE_ENTRY, "maximum_image_size": 1024, "target_downsample_size": 2048}],
            '[1] "cats".target_downsample_size',
            "above maximum_image_size",
        ),
        (
            [{**IMAGE_ENTRY, "resolution_type": "area", "resolution": 1, "minimum_image_size": 512}],
            '[1] "cats".minimum_image_size',
            "would be megapixels",
        ),
        (
            [{**IMAGE_ENTRY, "resolution_type": "area", "resolution": 1024}],
            '[1] "cats".resolution',
            "would be megapixels",
        ),
        ([{**IMAGE_ENTRY, "resolution": 1.0}], '[1] "cats".resolution', "would be pixels"),
        (
            [{**IMAGE_ENTRY, "resolution_type": "pixel", "resolution": 1.0}],
            '[1] "cats".resolution',
            "would be pixels",
        ),
        ([{**IMAGE_ENTRY, "minimum_image_size": 0.25}], '[1] "cats".minimum_image_size', "would be pixels"),
        (
            [{**IMAGE_ENTRY, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}],
            '[1] "cats".minimum_aspect_ratio',
            "above maximum_aspect_ratio",
        ),
    ],
)
def test_parse_datasets_invalid_combination_reports_key_and_reason(problems_of, entries, key, message):
    problems = problems_of({}, entries)
    assert list(problems) == [key]
    assert message in problems[key].message
    assert problems[key].file.name == "multidatabackend.json"


def test_parse_datasets_invalid_inherited_value_is_a_problem_of_config_json(problems_of):
    problem = problems_of({"resolution": 1.0})["resolution"]
    assert problem.file.name == "config.json"


def test_parse_datasets_size_in_wrong_unit_hint_contains_the_converted_size(problems_of):
    entry = {**IMAGE_ENTRY, "resolution_type": "area", "resolution": 1024}
    assert "such as 1," in problems_of({}, [entry])['[1] "cats".resolution'].hint
    assert (
        "such as 1000," in problems_of({}, [{**IMAGE_ENTRY, "resolution": 1.0}])['[1] "cats".resolution'].hint
    )


def test_check_training_two_lengths_is_a_problem(problems_of):
    config = {"max_train_steps": 10, "num_train_epochs": 2, "lr_warmup_steps": 11}
    assert set(problems_of(config)) == {"num_train_epochs", "lr_warmup_steps"}


def test_constant_scheduler_with_warmup_steps_becomes_constant_with_warmup(write_project):
    project = load_project(write_project({"lr_scheduler": "constant", "lr_warmup_steps": 5}))
    assert project.training.lr_scheduler == "constant_with_warmup"
    assert load_project(write_project({"lr_scheduler": "constant"})).training.lr_scheduler == "constant"


def test_skip_file_discovery_is_parsed_to_stages(write_project):
    dataset = only_dataset(write_project({}, [{**IMAGE_ENTRY, "skip_file_discovery": "vae, metadata"}]))
    assert dataset.skipped_stages == {"vae", "metadata"}


@pytest.mark.parametrize(
    ("entry", "strategy"),
    [
        ({"type": "huggingface", "dataset_name": "someone/cats"}, "huggingface"),
        ({"type": "csv", "csv_file": "list.csv"}, "csv"),
        ({"type": "csv", "csv_file": "list.csv", "caption_strategy": "instanceprompt"}, "instanceprompt"),
        ({"type": "aws", "url": "s3://bucket/cats"}, "filename"),
    ],
)
def test_parse_datasets_every_type_has_its_default_caption_strategy(write_project, entry, strategy):
    dataset = only_dataset(write_project({}, [{"id": "cats", "instance_prompt": "a cat", **entry}]))
    assert (dataset.type, dataset.caption_strategy) == (entry["type"], strategy)
    assert dataset.instance_data_dir is None


def test_url_in_instance_data_dir_is_moved_to_url(write_project):
    entry = {"id": "cats", "type": "aws", "instance_data_dir": "s3://bucket/cats"}
    assert only_dataset(write_project({}, [entry])).url == "s3://bucket/cats"


def test_weighted_crop_aspect_buckets_are_split_into_two_lists(write_project):
    entry = {
        **IMAGE_ENTRY,
        "crop": True,
        "crop_aspect": "random",
        "crop_aspect_buckets": {"1.0": 3, "0.75": "1"},
    }
    dataset = only_dataset(write_project({}, [entry]))
    assert dataset.crop_aspect_buckets == (1.0, 0.75)
    assert dataset.crop_aspect_weights == (3.0, 1.0)


def test_caption_filter_list_accepts_a_path_or_a_list(write_project):
    folder = write_project({}, [{**IMAGE_ENTRY, "caption_filter_list": "filter.txt"}])
    assert only_dataset(folder).caption_filter_list == folder / "filter.txt"
    folder = write_project({}, [{**IMAGE_ENTRY, "caption_filter_list": ["a photo of", "s/x/y/"]}])
    assert only_dataset(folder).caption_filter_list == ("a photo of", "s/x/y/")


def test_nested_objects_are_parsed_like_the_entry(write_project):
    entry = {
        **IMAGE_ENTRY,
        "caption_strategy": "parquet",
        "parquet": {"path": "a.parquet", "identifier_includes_extension": "true"},
        "caption_shuffle": {"enable": "true", "count": "3", "seed": None},
    }
    dataset = only_dataset(write_project({}, [entry]))
    assert dataset.parquet is not None
    assert dataset.parquet.identifier_includes_extension is True
    assert dataset.caption_shuffle is not None
    assert (dataset.caption_shuffle.enable, dataset.caption_shuffle.count) == (True, 3)


def test_nested_unknown_key_hint_contains_the_closest_key(problems_of):
    entry = {**IMAGE_ENTRY, "parquet": {"path": "a", "filename_colum": "f", "caption_column": 3}}
    problems = problems_of({}, [entry])
    assert problems['[1] "cats".parquet.filename_colum'].hint == "write filename_column"
    assert '[1] "cats".parquet.caption_column' in problems


def test_image_embeds_entry_is_ignored_with_a_warning(write_project):
    entry = {"id": "latents", "type": "local", "dataset_type": "image_embeds"}
    (warning,) = load_project(write_project({}, [IMAGE_ENTRY, entry])).warnings
    assert "image_embeds has no effect" in warning
