"""The facts of a key are on its field, and queries find the key by them."""

from typing import Annotated

import pytest
from pydantic import Field

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset, ParquetTable, TextEmbedsDataset
from sdxl_pipeline.config.schema.key_facts import (
    COMPARED_BY_VALUE,
    Identity,
    Key,
    key_of,
    keys_used_by,
    keys_with,
)
from sdxl_pipeline.config.schema.training import LENGTH_KEYS, PROFILE_KEYS, SECTIONS, TrainingSettings

MODELS = (TrainingSettings, ImageDataset, TextEmbedsDataset, ParquetTable)


class ExtendedSettings(TrainingSettings):
    """Settings with one more key, as an author would add it: by one annotated field."""

    new_folder: Annotated[
        str,
        Field(min_length=1),
        Key(Identity.SAVING, path="local", overridable=False, on_card=True, used_by=("lora",)),
    ] = Field("folder", description="A folder.")
    new_number: int = Field(1, description="A number.")


def test_keys_with_field_of_subclass_contains_the_new_key():
    assert {"output_dir", "new_folder"} <= {*keys_with(ExtendedSettings, lambda key: key.path == "local")}
    assert "new_folder" in keys_with(ExtendedSettings, lambda key: not key.overridable)
    assert "new_folder" in keys_with(ExtendedSettings, lambda key: key.on_card)
    assert "new_folder" not in keys_with(ExtendedSettings, lambda key: key.is_published)
    assert "new_folder" in keys_used_by(ExtendedSettings, "lora")
    assert "new_folder" not in keys_with(ExtendedSettings, lambda key: key.identity.affects_weights)


def test_key_of_field_without_facts_is_part_of_the_identity_and_overridable():
    key = key_of(ExtendedSettings.model_fields["new_number"])
    assert key == Key()
    assert key.identity is Identity.VALUE
    assert key.overridable
    assert key.is_published


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_model_fields_have_at_most_one_key(model):
    for name, field in model.model_fields.items():
        assert sum(isinstance(entry, Key) for entry in field.metadata) <= 1, name


@pytest.mark.parametrize("identity", Identity, ids=lambda identity: identity.name)
def test_identity_is_used_by_a_key(identity):
    assert keys_with(TrainingSettings, lambda key: key.identity is identity)
    assert identity.affects_weights or identity not in COMPARED_BY_VALUE


def test_profile_keys_are_fields_of_the_hardware_profile_and_not_set_by_default():
    assert {*PROFILE_KEYS} <= Hardware.model_fields.keys()
    defaults = TrainingSettings()
    assert {getattr(defaults, key) for key in PROFILE_KEYS} == {None}


def test_length_keys_affect_the_weights_and_are_overridable():
    assert LENGTH_KEYS == ("max_train_steps", "num_train_epochs")
    for name in LENGTH_KEYS:
        key = key_of(TrainingSettings.model_fields[name])
        assert key.identity is Identity.VALUE
        assert key.overridable


def test_validators_of_sections_have_unique_names():
    """TrainingSettings inherits from all sections: a validator of the same name in two of them would replace the other."""
    names = [
        name
        for section in SECTIONS
        for name in (
            *section.__pydantic_decorators__.field_validators,
            *section.__pydantic_decorators__.model_validators,
        )
        if name != "_normalize_value"
    ]
    assert len(names) == len(set(names))
    assert {*names} <= {
        *TrainingSettings.__pydantic_decorators__.field_validators,
        *TrainingSettings.__pydantic_decorators__.model_validators,
    }


def test_needs_are_other_keys():
    for name, field in TrainingSettings.model_fields.items():
        assert {*key_of(field).needs} <= TrainingSettings.model_fields.keys() - {name}, name


def test_inherited_keys_of_datasets_are_read_before_a_run_and_not_compared_by_value():
    for model in (ImageDataset, TextEmbedsDataset):
        for name in keys_with(model, lambda key: key.inherited):
            key = key_of(TrainingSettings.model_fields[name])
            assert not key.overridable, name
            assert key.identity not in COMPARED_BY_VALUE, name


def test_local_paths_and_base_model_sources_do_not_change_the_identity_by_their_spelling():
    for name in keys_with(TrainingSettings, lambda key: key.path in ("local", "base model", "checkpoint")):
        assert key_of(TrainingSettings.model_fields[name]).identity not in COMPARED_BY_VALUE, name


def test_download_folder_depends_on_a_subset_of_what_the_dataset_asset_depends_on():
    source, dataset = (keys_used_by(ImageDataset, consumer) for consumer in ("source", "dataset"))
    assert source < dataset
    assert keys_used_by(ImageDataset, "masks") < dataset
    assert keys_used_by(ImageDataset, "scan") < dataset
