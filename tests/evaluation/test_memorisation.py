"""Copies of training images are found among generated ones, and new images of the same concept are not taken for copies."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sdxl_pipeline.evaluation.caption_samples import plan_caption_samples, sample_captions
from sdxl_pipeline.evaluation.embeddings import ScoringModels, load_scoring_models
from sdxl_pipeline.evaluation.eval_models import load_eval_model
from sdxl_pipeline.evaluation.image_features import ImageFeatures, SourceImage, measure_features, read_images
from sdxl_pipeline.evaluation.memorisation import (
    DUPLICATE_CORRELATION,
    FIXED_CORRELATION,
    FIXED_SIMILARITY,
    MIN_CORRELATION,
    calibrate,
    check_memorisation,
)
from sdxl_pipeline.evaluation.scoring_model import ScoringModelFolders
from sdxl_pipeline.models.base_model import BUNDLED_CLIP
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, Memorisation
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main as train
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import load_samples
from tests.stages.test_train_golden import demo_spec
from tests.support.image_features import TRAIN_ZORPS, UNSEEN_ZORPS, render_zorp, save_images

LIMIT = 0.1


@pytest.fixture(scope="module")
def models() -> ScoringModels:
    return load_scoring_models(ScoringModelFolders(BUNDLED_CLIP, BUNDLED_CLIP), "cpu")


def features(
    folder: Path, images: list[np.ndarray], models: ScoringModels | None, dataset_id: str = "zorp"
) -> ImageFeatures:
    files = save_images(folder, images)
    return measure_features(
        (
            SourceImage(dataset_id, file.name, file, (pixels,))
            for file, pixels in zip(files, images, strict=True)
        ),
        models,
    )


@pytest.fixture(scope="module")
def training_images() -> list[np.ndarray]:
    return [render_zorp(zorp, seed) for seed, zorp in enumerate(TRAIN_ZORPS)]


def check(
    folder: Path,
    generated: list[np.ndarray],
    training: list[np.ndarray],
    models: ScoringModels | None,
    held_out: list[np.ndarray] | None = None,
) -> Memorisation:
    unseen = [render_zorp(zorp) for zorp in UNSEEN_ZORPS] if held_out is None else held_out
    return check_memorisation(
        features(folder / "generated", generated, models),
        features(folder / "training", training, models),
        features(folder / "held_out", unseen, models),
        LIMIT,
        folder,
    )


def with_noise(pixels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a copy that is not exact, as a model's is."""
    noise = np.random.default_rng(seed).normal(0, 4, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def new_zorps(count: int) -> list[np.ndarray]:
    """Return zorps with captions of the training images, that are moved and scaled otherwise."""
    return [render_zorp(zorp, seed=500 + number) for number, zorp in enumerate(TRAIN_ZORPS[:count])]


@pytest.mark.parametrize("embeds", [True, False])
def test_copies_are_flagged_with_their_training_image(
    tmp_path: Path, training_images: list[np.ndarray], models: ScoringModels, embeds: bool
):
    copies = [with_noise(training_images[4]), with_noise(training_images[9][:, ::-1])]
    result = check(tmp_path, [*copies, *new_zorps(6)], training_images, models if embeds else None)
    found = {Path(pair.image_path).name: pair.nearest for pair in result.pairs if pair.flagged}
    assert found["00.png"] == "zorp/04.png"
    assert (
        "01.png" in found or embeds
    )  # CLIP separates left from right, so that a mirrored copy differs by embedding
    assert result.flagged == sum(pair.flagged for pair in result.pairs)
    assert result.is_over_limit
    assert all((pair.similarity is None) != embeds for pair in result.pairs)
    assert f"{result.flagged} of 8 images" in result.text


@pytest.mark.parametrize("embeds", [True, False])
def test_new_images_of_the_concept_are_not_flagged(
    tmp_path: Path, training_images: list[np.ndarray], models: ScoringModels, embeds: bool
):
    result = check(tmp_path, new_zorps(16), training_images, models if embeds else None)
    assert not result.is_over_limit
    assert result.calibrated_on > 3


def test_few_training_images_have_fixed_limits(
    tmp_path: Path, training_images: list[np.ndarray], models: ScoringModels
):
    two = [training_images[0], training_images[10]]
    result = check(tmp_path, [with_noise(image) for image in two], two, models)
    assert (result.flagged, result.calibrated_on) == (2, 0)
    assert f"similarity {FIXED_SIMILARITY:.3f} and correlation {FIXED_CORRELATION:.3f}" in result.text
    assert "too few to calibrate on" in result.text
    assert check(tmp_path, new_zorps(2)[1:], two, models).flagged == 0


def test_images_as_near_to_held_out_images_are_not_flagged(
    tmp_path: Path, training_images: list[np.ndarray], models: ScoringModels
):
    """Where the held-out images equal the training images, nearness says nothing."""
    copies = [with_noise(image) for image in training_images[:4]]
    assert check(tmp_path, copies, training_images, models).flagged == 4
    control = [with_noise(image, seed=9) for image in training_images]
    assert check(tmp_path, copies, training_images, models, held_out=control).flagged < 4
    assert check(tmp_path, copies, training_images, models, held_out=control[:3]).flagged == 4  # too few


def test_limits_are_calibrated_on_different_training_images():
    """Two files of one photo would otherwise raise the limit to 1, and nothing could be a copy."""
    values = np.full((30, 30), 0.5)
    values[0, 1] = values[1, 0] = 0.85
    limits = calibrate(values, values)
    assert MIN_CORRELATION < limits.correlation <= 0.85
    assert limits.images == 30
    values[2, 3] = values[3, 2] = 0.999
    limits = calibrate(values, values)
    assert limits.images == 29
    assert limits.correlation < DUPLICATE_CORRELATION
    few = calibrate(values[:10, :10], values[:10, :10])
    assert few.correlation == 0.85  # the maximum
    assert calibrate(values[4:, 4:], values[4:, 4:]).correlation == MIN_CORRELATION


def test_sheet_shows_pairs_side_by_side(tmp_path: Path, training_images: list[np.ndarray]):
    result = check(tmp_path, [with_noise(training_images[0]), *new_zorps(2)], training_images, None)
    assert result.sheet_path == str(tmp_path / "memorisation.png")
    with Image.open(result.sheet_path) as opened:
        sheet = np.asarray(opened.convert("RGB")).astype(int)
    assert sheet.shape[1] > 2 * 96
    left, right = sheet[40:200, 40:200], sheet[40:200, 40 + 235 : 200 + 235]
    assert np.abs(left - right).mean() < 10  # the copy, in the first row
    assert sheet.shape[0] > 3 * 224


def test_check_memorisation_without_images_raises(tmp_path: Path, training_images: list[np.ndarray]):
    with pytest.raises(ValueError, match="needs generated images"):
        check(tmp_path, [], training_images, None)


OVERTRAINED = {
    "max_train_steps": 250,
    "train_batch_size": 2,
    "learning_rate": 3e-3,
    "lora_rank": 32,
    "lr_warmup_steps": 5,
    "snr_gamma": None,
    "caption_dropout_probability": 0.0,
    "num_caption_samples": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize(("images", "is_memorised"), [(2, True), (42, False)])
def test_lora_of_two_images_is_memorised_and_of_the_demos_is_not(
    tmp_path: Path, models: ScoringModels, images: int, is_memorised: bool
):
    """The training of the demo with more steps per image, on two of its zorps or on all; the two are reproduced by their captions."""
    spec = demo_spec(tmp_path)
    settings = spec.settings.model_copy(update=OVERTRAINED)
    datasets = tuple(dataset for dataset in spec.datasets if dataset.dataset_id != "world")
    zorps = pd.read_parquet(datasets[0].rows_path)
    zorps[zorps["path"].isin(sorted(set(zorps["path"]))[:images])].to_parquet(datasets[0].rows_path)
    spec = spec.model_copy(update={"settings": settings, "datasets": datasets})
    evaluation = EvaluateSpec(
        base_model=spec.base_model,
        hardware=spec.hardware,
        settings=settings,
        lora=train(spec, Reporter(), StopSignal()),
        datasets=datasets,
        prompts=(),
        output_dir=str(tmp_path),
    )
    training, held_out = (load_samples(datasets, split) for split in ("train", "eval"))
    plan = plan_caption_samples(training, datasets, settings)
    pipeline = load_eval_model(evaluation).pipeline
    generated = sample_captions(plan, pipeline, BatchReader(datasets), settings)
    result = check_memorisation(
        features(tmp_path / "generated", [np.asarray(each.image) for each in generated], models),
        measure_features(read_images(training, datasets), models),
        measure_features(read_images(held_out, datasets), models),
        LIMIT,
        tmp_path,
    )
    assert result.is_over_limit == is_memorised, result.text
