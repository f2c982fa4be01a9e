"""Caption samples: captions of all datasets in turn, several seeds each, and equal noise for both models."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_pipeline.evaluation.caption_samples import (
    captioned_images,
    captioned_samples,
    plan_caption_samples,
    sample_captions,
)
from sdxl_pipeline.evaluation.eval_models import load_eval_model
from sdxl_pipeline.evaluation.evaluation_identity import candidates_of
from sdxl_pipeline.evaluation.gallery import GalleryImage
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import load_samples
from tests.support.evaluation_specs import make_evaluate_spec, tiny_settings
from tests.support.training_datasets import make_dataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingDataset, ...]:
    folder = tmp_path_factory.mktemp("datasets")
    few = make_dataset(folder / "few", "few", buckets=((64, 64),) * 2, captions=2, crops=2)
    many = make_dataset(folder / "many", "many", buckets=((64, 96),) * 9)
    prior = make_dataset(folder / "prior", "prior", buckets=((64, 64),) * 9)
    return few, many, prior.model_copy(update={"is_regularisation": True})


def test_plan_takes_captions_of_all_datasets_in_turn(datasets: tuple[TrainingDataset, ...]):
    training = load_samples(datasets, "train")
    settings = tiny_settings(num_caption_samples=12, caption_sample_seeds=2)
    plan = plan_caption_samples(training, datasets, settings)
    assert [each.sample.dataset_id for each in plan[::2]] == ["few", "many"] * 2 + ["many"] * 2
    assert [each.seed for each in plan] == [7, 8] * 6
    assert len({each.caption for each in plan}) == 6
    assert len({each.name for each in plan}) == 12
    assert all(each.caption.endswith(" 0") for each in plan)  # an image's first caption
    assert plan == plan_caption_samples(load_samples(datasets, "train"), datasets, settings)


def test_plan_with_few_captions_uses_more_seeds(datasets: tuple[TrainingDataset, ...]):
    settings = tiny_settings(num_caption_samples=9, caption_sample_seeds=1)
    plan = plan_caption_samples(load_samples(datasets[:1], "train"), datasets[:1], settings)
    assert [each.seed for each in plan] == [7, 8, 9, 10, 11, 7, 8, 9, 10]


def test_plan_of_0_samples_is_empty(datasets: tuple[TrainingDataset, ...]):
    training = load_samples(datasets, "train")
    assert plan_caption_samples(training, datasets, tiny_settings(num_caption_samples=0)) == []


def test_captioned_samples_have_different_captions(datasets: tuple[TrainingDataset, ...], tmp_path: Path):
    """Two datasets of the same images, in two resolutions, share their captions."""
    again = datasets[1].model_copy(update={"dataset_id": "again"})
    both = (datasets[1], again)
    captioned = captioned_samples(load_samples(both, "train"), both, 32)
    assert len(captioned) == len({caption for _, caption in captioned}) == 9


def test_captioned_images_leaves_unreadable_images_out(tmp_path: Path):
    dataset = make_dataset(tmp_path, buckets=((64, 64),) * 3)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (192, 204), "red").save(tmp_path / "images" / "image_01.png")
    ((image, caption),) = captioned_images(load_samples([dataset], "train"), [dataset], 8)
    assert image.size == (64, 64)
    assert caption == "shapes 1 0"


def test_sample_captions_depends_on_seed_and_model(tmp_path: Path):
    spec = make_evaluate_spec(
        tmp_path, scale=0.1, num_caption_samples=4, caption_sample_seeds=2, evaluation_type="none"
    )
    training = load_samples(spec.datasets, "train")
    plan = plan_caption_samples(training, spec.datasets, spec.settings)
    eval_model, reader = load_eval_model(spec), BatchReader(spec.datasets)
    eval_model.load(candidates_of(spec)[-1])
    progress = []

    def sample() -> list[GalleryImage]:
        return sample_captions(
            plan, eval_model.pipeline, reader, spec.settings, lambda *done: progress.append(done)
        )

    images = sample()
    trained = [image.pixels for image in images]
    with eval_model.base():
        base = [image.pixels for image in sample()]
    assert progress == [(done, 4) for done in range(4)] * 2
    assert [image.shape[:2] for image in trained] == [each.sample.bucket for each in plan]
    assert all(not np.array_equal(*pair) for pair in zip(base, trained, strict=True))
    assert not np.array_equal(trained[0], trained[1])  # another seed
    assert all(
        np.array_equal(*pair) for pair in zip(trained, [image.pixels for image in sample()], strict=True)
    )
