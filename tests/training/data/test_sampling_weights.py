"""What an epoch takes of each dataset, and what is said and done when that does not fill a step."""

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.sampling_weights import plan_sampling_weights
from tests.support.training_datasets import SETTINGS, make_dataset
from tests.training.data.test_bucket_sampler import rows, samples_of


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"pretrained_model_name_or_path": "model", **SETTINGS, **changes})


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, "d")


def test_enough_is_left_as_it_is(dataset):
    planned = plan_sampling_weights([dataset], samples_of(rows(5)), settings(train_batch_size=5), 1)
    assert (planned.by_dataset, planned.raised_repeats) == ({"d": 1.0}, {})


def test_too_few_images_is_an_error_with_the_repeats_that_would_do(dataset):
    samples, asked = samples_of(rows(5)), settings(train_batch_size=4, gradient_accumulation_steps=3)
    with pytest.raises(
        UserError,
        match=r"give 5 images.*takes 24: train_batch_size 4 x 2 processes x gradient_accumulation_steps 3.*\"repeats\": 4 .*'d'",
    ):
        plan_sampling_weights([dataset], samples, asked, 2)
    plan_sampling_weights([dataset.model_copy(update={"repeats": 4})], samples, asked, 2)
    with pytest.raises(UserError, match="give 20 images"):
        plan_sampling_weights([dataset.model_copy(update={"repeats": 3})], samples, asked, 2)


def test_crops_of_one_image_do_not_fill_a_step(dataset):
    with pytest.raises(UserError, match="give 5 images"):
        plan_sampling_weights([dataset], samples_of(rows(5, crops=4)), settings(train_batch_size=8), 1)


def test_no_image_is_an_error(dataset):
    with pytest.raises(UserError, match="no image to train on"):
        plan_sampling_weights([dataset], samples_of(rows(1)).first_by_key(0), settings(), 1)


def test_the_suggested_repeats_do_for_a_dataset_of_small_probability(tmp_path):
    datasets = [make_dataset(tmp_path / "a", "a", probability=0.5), make_dataset(tmp_path / "b", "b")]
    samples = samples_of(rows(5, "a"), rows(2, "b"))
    with pytest.raises(UserError, match=r"\"repeats\": 3 .*'a'"):
        plan_sampling_weights(datasets, samples, settings(train_batch_size=12), 1)
    plan_sampling_weights(
        [datasets[0].model_copy(update={"repeats": 3}), datasets[1]],
        samples,
        settings(train_batch_size=12),
        1,
    )


@pytest.mark.parametrize(("batch_size", "factor"), [(11, 2), (21, 4), (12, 3)])
def test_oversubscription_raises_repeats_until_a_step_is_full(tmp_path, batch_size, factor):
    datasets = [
        make_dataset(tmp_path / "a", "a", repeats=1),
        make_dataset(tmp_path / "b", "b", probability=0.25),
    ]
    samples = samples_of(rows(2, "a"), rows(7, "b"))  # 4 and 1.75 an epoch
    asked = settings(train_batch_size=batch_size, allow_dataset_oversubscription=True)
    planned = plan_sampling_weights(datasets, samples, asked, 1)
    assert planned.raised_repeats == {"a": 2 * factor - 1, "b": factor - 1}
    assert planned.by_dataset == {"a": 2.0 * factor, "b": 0.25 * factor}, "each keeps its share"
