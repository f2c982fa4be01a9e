"""Holds: which entries of masks and of regularisation images are taken, which are refused and why, and what is warned of."""

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


def test_masks_belong_to_the_dataset_that_names_them(write_project):
    project = load_project(write_project({}, [{**IMAGE_ENTRY, "id": "dogs"}, MASKED, MASKS]))
    dogs, cats = project.datasets
    assert [entry.id for entry in project.mask_datasets] == ["cat-masks"]
    assert project.masks_of(cats) == project.mask_datasets[0]
    assert project.masks_of(dogs) is None
    assert project.mask_datasets[0].instance_data_dir == project.folder / "masks"
    assert not project.warnings


def test_a_mask_needs_no_caption_whatever_config_says_of_captions(write_project):
    config = {
        "caption_strategy": "instanceprompt",
        "instance_prompt": "a cat",
        "prepend_instance_prompt": True,
    }
    entry = load_project(write_project(config, [MASKED, MASKS])).mask_datasets[0]
    assert (entry.caption_strategy, entry.missing_captions) == ("filename", "empty")
    assert not entry.prepend_instance_prompt


def test_the_references_own_spelling_works(write_project):
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


def test_geometry_of_a_mask_that_is_not_its_images_is_told(write_project):
    project = load_project(write_project({}, [MASKED, {**MASKS, "crop": True, "resolution": 512}]))
    (warning,) = project.warnings
    assert "its own resolution, crop are not read" in warning
    assert "as its image in cats" in warning


def test_masks_that_nobody_names_are_told(write_project):
    (warning,) = load_project(write_project({}, [IMAGE_ENTRY, MASKS])).warnings
    assert "no dataset names it in conditioning_data" in warning


def test_settings_of_what_is_not_there_are_told(write_project):
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


def test_masks_that_are_never_used_are_told(write_project):
    (warning,) = load_project(write_project({"masked_loss_probability": 0}, [MASKED, MASKS])).warnings
    assert "never used" in warning


@pytest.mark.parametrize(
    ("entries", "key", "words"),
    [
        ([MASKED], '[1] "cats".conditioning_data', "names no entry"),
        ([MASKED, {**MASKS, "disabled": True}], '[1] "cats".conditioning_data', "names no entry"),
        ([{**IMAGE_ENTRY, "conditioning_data": ["a", "b"]}], '[1] "cats".conditioning_data', "several"),
        ([MASKED, {**MASKS, "conditioning_type": None}], '[2] "cat-masks".conditioning_type', "is missing"),
        (
            [MASKED, {**MASKS, "conditioning_type": "controlnet"}],
            '[2] "cat-masks".conditioning_type',
            "not available yet",
        ),
        (
            [MASKED, {**MASKS, "type": "csv", "csv_file": "list.csv", "instance_data_dir": None}],
            '[2] "cat-masks".type',
            "no mask would have its image's name",
        ),
        (
            [IMAGE_ENTRY, {**MASKS, "source_dataset_id": "cats"}],
            '[2] "cat-masks".source_dataset_id',
            "does not name this entry",
        ),
        ([{**IMAGE_ENTRY, "conditioning_type": "mask"}], '[1] "cats".conditioning_type', "given for images"),
        (
            [IMAGE_ENTRY, {**MASKED, "id": "held", "dataset_type": "eval"}, MASKS],
            '[2] "held".conditioning_data',
            "measured on whole images",
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
            "nothing to learn",
        ),
        ([MASKED, {**MASKS, "id": "a"}, MASKS, MASKS], '[4] "cat-masks".id', "already that of entry"),
    ],
)
def test_what_cannot_be_meant_is_refused(problems_of, entries, key, words):
    assert words in problems_of({}, entries)[key].message
