"""Unused keys of a dataset's entry are reported with the reason, and every key is classified."""

from typing import Any

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.validators.unused_dataset_settings import RULES

ENTRY = {"id": "cats", "instance_data_dir": "data", "caption_strategy": "textfile"}
HUB = {"id": "cats", "type": "huggingface", "dataset_name": "someone/cats"}
CSV = {"id": "cats", "type": "csv", "csv_file": "cats.csv"}
BUCKET = {"id": "cats", "type": "aws", "url": "gs://cats"}
PROMPT = {**ENTRY, "caption_strategy": "instanceprompt", "instance_prompt": "a cat"}

ALWAYS_USED = """id type dataset_type disabled verify find_near_duplicates max_num_samples resolution resolution_type crop
    minimum_image_size maximum_image_size target_downsample_size minimum_aspect_ratio maximum_aspect_ratio max_upscale_threshold
    aspect_bucket_alignment conditioning_data conditioning_type source_dataset_id is_regularisation_data cache_dir_vae
    vae_cache_disable text_embeds only_instance_prompt"""
SIZES_ARE_READ_ANYWAY = {"metadata_backend"}


def test_every_dataset_key_has_a_rule_or_always_an_effect():
    ruled = [key for keys, _ in RULES for key in keys]
    assert len(ruled) == len(set(ruled))
    assert set(ruled).isdisjoint(ALWAYS_USED.split())
    assert {*ruled, *ALWAYS_USED.split(), *SIZES_ARE_READ_ANYWAY} == set(ImageDataset.model_fields)


@pytest.mark.parametrize(
    ("entry", "settings", "reason"),
    [
        (HUB, {"instance_data_dir": "data"}, "type is huggingface"),
        (CSV, {"aws_bucket_name": "cats"}, "type is csv"),
        (BUCKET, {"aws_data_prefix": "cats"}, "url is given"),
        (BUCKET, {"aws_endpoint_url": "https://s3.example.org"}, "url is not an s3:// URL"),
        (ENTRY, {"aws_region_name": "eu"}, "type is local"),
        (ENTRY, {"dataset_config": "small"}, "type is local"),
        (ENTRY, {"split": "train"}, "type is local"),
        (ENTRY, {"revision": "main"}, "type is local"),
        (ENTRY, {"caption_column": "text"}, "caption_strategy is textfile"),
        ({**HUB, "caption_strategy": "filename"}, {"caption_column": "text"}, "caption_strategy is filename"),
        (ENTRY, {"csv_url_column": "address"}, "type is local"),
        (
            {**CSV, "caption_strategy": "filename"},
            {"csv_caption_column": "text"},
            "caption_strategy is filename",
        ),
        (ENTRY, {"allow_private_addresses": True}, "type is local"),
        (BUCKET, {"allow_private_addresses": True}, "only downloads by http"),
        ({**ENTRY, "verify": True}, {"skip_file_discovery": "vae,metadata"}, "verify is true"),
        (ENTRY, {"crop_style": "center"}, "crop is false"),
        (ENTRY, {"crop_style": "random"}, "crop is false"),
        ({**ENTRY, "crop": False}, {"crop_aspect": "square"}, "crop is false"),
        ({**ENTRY, "crop": True}, {"crop_aspect_buckets": [1.0, 0.5]}, "crop_aspect is square"),
        (
            {**ENTRY, "crop": True, "crop_aspect": "closest"},
            {"crop_aspect_weights": [1, 3], "crop_aspect_buckets": [1.0, 0.5]},
            "crop_aspect is closest",
        ),
        (
            {**ENTRY, "crop": True, "crop_aspect": "closest", "crop_aspect_buckets": {"1.0": 3, "0.5": 1}},
            {"crop_aspect_weights": None},
            "crop_aspect is closest",
        ),
        (ENTRY, {"crops_per_image": 2}, "crop is false"),
        ({**ENTRY, "crop": True, "crop_style": "center"}, {"crops_per_image": 2}, "crop_style is center"),
        ({**ENTRY, "crop": True}, {"aspect_bucket_rounding": 3}, "every crop is square"),
        (
            {**PROMPT, "caption_strategy": "textfile", "only_instance_prompt": True},
            {"caption_strategy": "textfile"},
            "only_instance_prompt is true",
        ),
        (ENTRY, {"parquet": {"path": "t.parquet"}}, "caption_strategy is textfile"),
        (
            {**ENTRY, "caption_strategy": "filename"},
            {"disable_multiline_split": True},
            "caption_strategy is filename",
        ),
        (ENTRY, {"caption_shuffle": {"count": 3}}, "count need enable: true"),
        (ENTRY, {"caption_shuffle": {"enable": False, "seed": 3}}, "seed need enable: true"),
        (PROMPT, {"caption_shuffle": True}, "caption_strategy is instanceprompt"),
        (PROMPT, {"caption_filter_list": ["a"]}, "caption_strategy is instanceprompt"),
        (PROMPT, {"missing_captions": "empty"}, "caption_strategy is instanceprompt"),
        (PROMPT, {"prepend_instance_prompt": True}, "caption_strategy is instanceprompt"),
        (ENTRY, {"instance_prompt": "a cat"}, "write prepend_instance_prompt: true"),
        (ENTRY, {"missing_masks": "unmasked"}, "no conditioning_data"),
        ({**ENTRY, "vae_cache_disable": True}, {"vae_cache_ondemand": True}, "vae_cache_disable is true"),
        (ENTRY, {"vae_cache_clear_each_epoch": True}, "each epoch computes the same crop"),
        (
            {**ENTRY, "crop": True, "crop_style": "center"},
            {"vae_cache_clear_each_epoch": True},
            "each epoch computes the same crop",
        ),
        (ENTRY, {"probability": 0.5}, "the only dataset"),
    ],
)
def test_find_unused_dataset_settings_reports_key_and_reason(write_project, entry, settings, reason):
    project = load_project(write_project({}, [{**entry, **settings}]))
    key = next(iter(settings))
    (warning,) = [warning for warning in project.warnings if f'"cats".{key} ' in warning]
    assert f'[1] "cats".{key} has no effect: ' in warning
    assert reason in warning
    assert warning in project.unused_settings["cats"]


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0], "crop_style": "center"},
        {"crop": True, "crops_per_image": 4, "random_flip": True, "repeats": 3},
        {"crop": True, "vae_cache_clear_each_epoch": True},
        {"instance_prompt": "a cat", "prepend_instance_prompt": True, "caption_filter_list": ["x"]},
        {"caption_strategy": "instanceprompt", "instance_prompt": "a cat", "only_instance_prompt": True},
        {"caption_shuffle": {"enable": True, "count": 3}, "disable_multiline_split": True},
        {"crop_aspect_buckets": [], "instance_prompt": "", "vae_cache_ondemand": False, "url": None},
        {"probability": 1.0, "crops_per_image": 1, "repeats": 0},
    ],
)
def test_find_unused_dataset_settings_effective_or_off_has_no_warning(write_project, settings):
    assert load_project(write_project({}, [{**ENTRY, **settings}])).warnings == ()


def test_find_unused_dataset_settings_of_eval_dataset_are_reported(write_project):
    settings = {"dataset_type": "eval", "repeats": 2, "probability": 2, "random_flip": True}
    project = load_project(write_project({}, [ENTRY, {**ENTRY, **settings, "id": "held"}]))
    assert len(project.unused_settings["held"]) == 3
    assert all("an eval dataset is not trained on" in warning for warning in project.warnings)


def test_inherited_key_unused_by_all_datasets_is_reported_for_config_json(write_project):
    config: dict[str, Any] = {"instance_prompt": "a cat", "vae_cache_ondemand": True}
    (warning,) = load_project(write_project(config, [ENTRY])).warnings
    assert warning.startswith("config.json: instance_prompt has no effect: in every dataset that inherits it")
    uses = {**ENTRY, "id": "more", "instance_data_dir": "more", "prepend_instance_prompt": True}
    assert load_project(write_project(config, [ENTRY, uses])).warnings == ()


def test_unused_mask_entry_and_text_embeds_settings_are_reported(write_project):
    masks = {
        "id": "masks",
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": "masks",
        "caption_strategy": "textfile",
        "repeats": 2,
    }
    texts = [{"id": name, "dataset_type": "text_embeds"} for name in ("first", "second")]
    entries = [{**ENTRY, "conditioning_data": "masks"}, masks, *texts]
    warnings = load_project(write_project({}, entries)).warnings
    assert warnings == (
        """multidatabackend.json: [4] "second" has no effect: it is in no dataset's text_embeds""",
        'multidatabackend.json: [2] "masks" its caption_strategy, repeats have no effect: masks have no captions, latents or repeats',
    )
    both = {**texts[0], "text_cache_ondemand": True, "text_cache_disable": True}
    (warning,) = load_project(write_project({}, [ENTRY, both])).warnings
    assert '"first".text_cache_ondemand has no effect: text_cache_disable is true' in warning


@pytest.mark.parametrize("folder", ["data", "data/reg"])
def test_unused_across_entries_regularisation_within_training_folder_is_reported(write_project, folder):
    other = {**ENTRY, "id": "reg", "instance_data_dir": folder, "is_regularisation_data": True}
    (warning,) = load_project(write_project({}, [ENTRY, other])).warnings
    assert "its folder is within that of cats" in warning
    assert load_project(write_project({}, [ENTRY, {**other, "instance_data_dir": "reg"}])).warnings == ()
