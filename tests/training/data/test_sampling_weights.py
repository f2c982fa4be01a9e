"""Sampling weights per epoch, and what happens if an epoch does not fill an optimizer step."""

from collections.abc import Sequence

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.data.training_plan import SampledDataset, SamplingWeights, plan_sampling_weights
from tests.support.sample_tables import sample_rows, samples_of
from tests.support.training_datasets import SETTINGS, make_dataset


def make_settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"pretrained_model_name_or_path": "model", **SETTINGS, **changes})


def plan(
    datasets: Sequence[SampledDataset], samples: Samples, settings: TrainingSettings, num_processes: int
) -> SamplingWeights:
    return plan_sampling_weights(
        datasets, samples, settings, num_processes, settings.allow_dataset_oversubscription
    )


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, "d")


def test_plan_sampling_weights_full_step_keeps_weights(dataset):
    planned = plan([dataset], samples_of(sample_rows(5)), make_settings(train_batch_size=5), 1)
    assert (planned.by_dataset, planned.raised_repeats) == ({"d": 1.0}, {})


def test_plan_sampling_weights_too_few_images_raises_with_sufficient_repeats(dataset):
    samples, settings = (
        samples_of(sample_rows(5)),
        make_settings(train_batch_size=4, gradient_accumulation_steps=3),
    )
    with pytest.raises(
        UserError,
        match=r"give 5 images.*takes 24: train_batch_size 4 x 2 processes x gradient_accumulation_steps 3.*\"repeats\": 4 .*'d'",
    ):
        plan([dataset], samples, settings, 2)
    plan([dataset.model_copy(update={"repeats": 4})], samples, settings, 2)
    with pytest.raises(UserError, match="give 20 images"):
        plan([dataset.model_copy(update={"repeats": 3})], samples, settings, 2)


def test_plan_sampling_weights_counts_images_not_crops(dataset):
    with pytest.raises(UserError, match="give 5 images"):
        plan([dataset], samples_of(sample_rows(5, crops=4)), make_settings(train_batch_size=8), 1)


def test_plan_sampling_weights_without_images_raises(dataset):
    with pytest.raises(UserError, match="no image to train on"):
        plan([dataset], samples_of(sample_rows(1)).first_by_key(0), make_settings(), 1)


def test_plan_sampling_weights_suggested_repeats_suffice_with_small_probability(tmp_path):
    datasets = [make_dataset(tmp_path / "a", "a", probability=0.5), make_dataset(tmp_path / "b", "b")]
    samples = samples_of(sample_rows(5, "a"), sample_rows(2, "b"))
    with pytest.raises(UserError, match=r"\"repeats\": 3 .*'a'"):
        plan(datasets, samples, make_settings(train_batch_size=12), 1)
    plan(
        [datasets[0].model_copy(update={"repeats": 3}), datasets[1]],
        samples,
        make_settings(train_batch_size=12),
        1,
    )


@pytest.mark.parametrize(("batch_size", "factor"), [(11, 2), (21, 4), (12, 3)])
def test_plan_sampling_weights_oversubscription_raises_repeats_to_fill_a_step(tmp_path, batch_size, factor):
    datasets = [
        make_dataset(tmp_path / "a", "a", repeats=1),
        make_dataset(tmp_path / "b", "b", probability=0.25),
    ]
    samples = samples_of(sample_rows(2, "a"), sample_rows(7, "b"))  # 4 and 1.75 images per epoch
    settings = make_settings(train_batch_size=batch_size, allow_dataset_oversubscription=True)
    planned = plan(datasets, samples, settings, 1)
    assert planned.raised_repeats == {"a": 2 * factor - 1, "b": factor - 1}
    assert planned.by_dataset == {"a": 2.0 * factor, "b": 0.25 * factor}, "ratios are unchanged"
