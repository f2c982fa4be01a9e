"""Valid and invalid entries of masks and regularisation images, and warnings about them."""

import pytest

from sdxl_pipeline.config.loader import load_project
from tests.config.conftest import IMAGE_ENTRY

MASKS = {
    "id": "cat-masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "masks",
}
MASKED = {**IMAGE_ENTRY, "conditioning_data": "cat-masks"}


def test_masks_of_returns_the_entry_of_conditioning_data(write_project):
    project = load_project(write_project({}, [{**IMAGE_ENTRY, "id": "dogs"}, MASKED, MASKS]))
    dogs, cats = project.datasets
    assert [entry.id for entry in project.mask_datasets] == ["cat-masks"]
    assert project.masks_of(cats) == project.mask_datasets[0]
    assert project.masks_of(dogs) is None
    assert project.mask_datasets[0].instance_data_dir == project.folder / "masks"
    assert not project.warnings


def test_mask_source_needs_no_caption_settings(write_project):
    config = {
        "caption_strategy": "instanceprompt",
        "instance_prompt": "a cat",
        "prepend_instance_prompt": True,
    }
    entry = load_project(write_project(config, [MASKED, MASKS])).mask_datasets[0]
    assert (entry.caption_strategy, entry.missing_captions) == ("filename", "empty")
    assert not entry.prepend_instance_prompt


def test_load_project_simpletuner_mask_aliases_load(write_project):
    geometry = {"resolution": 512, "crop": True, "crop_aspect": "square", "crop_style": "center"}
    entries = [
        {**MASKED, **geometry, "conditioning_data": ["cat-masks"]},
        {**MASKS, **geometry, "source_dataset_id": "cats"},
        {
            **IMAGE_ENTRY,
            "id": "people",
            "instance_data_dir": "people",
            "is_regularization_data": "true",
        },
    ]
    project = load_project(write_project({"masked_loss_probability": "0.5"}, entries))
    assert project.datasets[0].conditioning_data == "cat-masks"
    assert project.datasets[1].is_regularisation_data
    assert project.training.masked_loss_probability == 0.5
    assert not project.warnings


def test_check_mask_links_geometry_that_differs_is_a_warning(write_project):
    project = load_project(write_project({}, [MASKED, {**MASKS, "crop": True, "resolution": 512}]))
    (warning,) = project.warnings
    assert "its resolution, crop are ignored" in warning
    assert "like its image in cats" in warning


def test_check_mask_links_unused_masks_are_a_warning(write_project):
    (warning,) = load_project(write_project({}, [IMAGE_ENTRY, MASKS])).warnings
    assert "is in no dataset's conditioning_data" in warning


def test_unused_mask_settings_without_masks_are_warnings(write_project):
    config = {"masked_loss_probability": 0.5, "prior_loss_weight": 2}
    warnings = load_project(write_project(config, [IMAGE_ENTRY])).warnings
    assert len(warnings) == 2
    assert all("has no effect" in warning for warning in warnings)
    people = {
        **IMAGE_ENTRY,
        "id": "people",
        "instance_data_dir": "people",
        "is_regularisation_data": True,
    }
    assert not load_project(write_project(config, [MASKED, MASKS, people])).warnings


def test_unused_mask_settings_probability_zero_is_a_warning(write_project):
    (warning,) = load_project(write_project({"masked_loss_probability": 0}, [MASKED, MASKS])).warnings
    assert "read but not used" in warning


@pytest.mark.parametrize(
    ("entries", "key", "message"),
    [
        ([MASKED], '[1] "cats".conditioning_data', "is the id of no enabled entry"),
        (
            [MASKED, {**MASKS, "disabled": True}],
            '[1] "cats".conditioning_data',
            "is the id of no enabled entry",
        ),
        ([{**IMAGE_ENTRY, "conditioning_data": ["a", "b"]}], '[1] "cats".conditioning_data', "several"),
        ([MASKED, {**MASKS, "conditioning_type": None}], '[2] "cat-masks".conditioning_type', "is missing"),
        (
            [MASKED, {**MASKS, "conditioning_type": "controlnet"}],
            '[2] "cat-masks".conditioning_type',
            "not supported",
        ),
        (
            [MASKED, {**MASKS, "type": "csv", "csv_file": "list.csv", "instance_data_dir": None}],
            '[2] "cat-masks".type',
            "no mask would have the name of its image",
        ),
        (
            [IMAGE_ENTRY, {**MASKS, "source_dataset_id": "cats"}],
            '[2] "cat-masks".source_dataset_id',
            "conditioning_data is not this entry",
        ),
        ([{**IMAGE_ENTRY, "conditioning_type": "mask"}], '[1] "cats".conditioning_type', "set for images"),
        (
            [IMAGE_ENTRY, {**MASKED, "id": "held", "dataset_type": "eval"}, MASKS],
            '[2] "held".conditioning_data',
            "the eval loss uses no masks",
        ),
        (
            [
                IMAGE_ENTRY,
                {**IMAGE_ENTRY, "id": "held", "dataset_type": "eval", "is_regularisation_data": True},
            ],
            '[2] "held".is_regularisation_data',
            "not trained on",
        ),
        (
            [{**IMAGE_ENTRY, "is_regularisation_data": True}],
            '[1] "cats".is_regularisation_data',
            "no images to train on",
        ),
        ([MASKED, {**MASKS, "id": "a"}, MASKS, MASKS], '[4] "cat-masks".id', "already that of entry"),
    ],
)
def test_mask_rules_invalid_combination_reports_key_and_reason(problems_of, entries, key, message):
    assert message in problems_of({}, entries)[key].message
