"""Scores equal their definitions pair by pair, and one that means nothing is omitted with a reason."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sdxl_pipeline.evaluation.clip_score import ClipScorer
from sdxl_pipeline.evaluation.scores import (
    CaptionFeatures,
    ClipScores,
    GalleryPair,
    balanced_reference,
    measure_diversity,
    measure_fidelity,
    measure_scores,
    paired_score,
    score_gallery,
    tells_captions_apart,
)
from sdxl_pipeline.models.base_model import BUNDLED_CLIP
from tests.support.image_features import (
    UNSEEN_ZORPS,
    embedding_features,
    render_zorp,
)

MODELS = {"clip": "bundled:tiny-clip", "similarity": "bundled:tiny-clip"}


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    return ClipScorer(BUNDLED_CLIP)


def vectors(count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    return np.eye(8)[0] + spread * np.random.default_rng(seed).normal(size=(count, 8))


def caption_features(
    training: int = 6, datasets: tuple[str, ...] = ("cats", "cats", "dogs", "dogs")
) -> CaptionFeatures:
    owners = [("cats", "dogs")[number % 2] for number in range(training)]
    return CaptionFeatures(
        captions=("a cat", "a cat", "a dog", "a dog"),
        base=embedding_features(vectors(4, 1), datasets),
        lora=embedding_features(vectors(4, 2, spread=0.2), datasets),
        training=embedding_features(vectors(training, 3), owners),
    )


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(sum(a * b for a, b in zip(x, y, strict=True)))


def test_paired_score_has_standard_error_of_differences():
    score = paired_score([10.0, 50.0, 90.0], [12.0, 53.0, 91.0])
    assert (score.base, score.lora) == (50.0, 52.0)
    assert (score.difference.mean, score.difference.images) == (2.0, 3)
    assert score.difference.standard_error == pytest.approx(1 / 3**0.5)
    assert paired_score([1.0], [2.0]).difference.standard_error is None


def test_fidelity_equals_mean_cosine_within_the_captions_dataset():
    samples = caption_features()
    training = samples.training.similarity
    assert training is not None
    by_dataset = {"cats": training[[0, 2, 4]], "dogs": training[[1, 3, 5]]}
    score = measure_fidelity(samples)
    for value, images in ((score.base, samples.base), (score.lora, samples.lora)):
        assert images.similarity is not None
        pairs = [
            cosine(vector, real)
            for vector, name in zip(images.similarity, images.dataset_ids, strict=True)
            for real in by_dataset[name]
        ]
        assert value == pytest.approx(np.mean(pairs))
    own = [cosine(x, y) for reals in by_dataset.values() for x, y in itertools.permutations(reals, 2)]
    assert score.ceiling == pytest.approx(np.mean(own))
    assert score.difference.images == 4


def test_fidelity_without_second_training_image_has_no_ceiling():
    assert measure_fidelity(caption_features(training=2)).ceiling is None


def test_diversity_is_mean_distance_of_a_captions_images():
    samples = caption_features()
    score = measure_diversity(samples)
    assert score is not None
    base = samples.base.similarity
    assert base is not None
    assert score.base == pytest.approx(1 - (cosine(base[0], base[1]) + cosine(base[2], base[3])) / 2)
    assert score.lora < score.base
    assert score.difference.images == 2
    identical = np.repeat(vectors(2, 5), 2, axis=0)
    collapsed = CaptionFeatures(
        samples.captions, samples.base, embedding_features(identical), samples.training
    )
    collapsed_score = measure_diversity(collapsed)
    assert collapsed_score is not None
    assert collapsed_score.lora == pytest.approx(0, abs=1e-12)


def test_balanced_reference_has_the_proportions_of_the_samples():
    training = embedding_features(vectors(40, 1), ["cats"] * 30 + ["dogs"] * 10)
    generated = embedding_features(vectors(8, 2), ["cats"] * 4 + ["dogs"] * 4)
    assert training.clip is not None
    reference = balanced_reference(training, generated)
    assert reference.tolist() == training.clip[[*range(10), *range(30, 40)]].tolist()
    only_cats = embedding_features(vectors(8, 2), ["cats"] * 8)
    assert len(balanced_reference(training, only_cats)) == 30


def test_clip_score_pairs_images_of_one_prompt_and_seed(clip: ClipScorer):
    gallery = [
        GalleryPair(
            f"a {color} circle",
            *(Image.fromarray(render_zorp((color, "black", place))) for place in ("left", "right")),
        )
        for color in ("red", "blue", "yellow")
    ]
    scores = score_gallery(clip, gallery)
    for number, pair in enumerate(gallery):
        assert scores.base[number] == pytest.approx(clip.scores([pair.base], [pair.prompt])[0], abs=1e-3)
        assert scores.lora[number] == pytest.approx(clip.scores([pair.lora], [pair.prompt])[0], abs=1e-3)


def zorp_pairs() -> list[tuple[Image.Image, str]]:
    return [
        (
            Image.fromarray(render_zorp(each)),
            f"a large {each[0]} zorp at the {each[2]} on a {each[1]} background",
        )
        for each in UNSEEN_ZORPS
    ]


def test_measure_scores_reports_clip_score_with_the_training_images_own(clip: ClipScorer):
    pairs = zorp_pairs()
    ceiling = np.mean(clip.scores(*zip(*pairs, strict=True)))
    scores = measure_scores(clip, ClipScores([94.0, 95.0], [60.0, 70.0]), pairs, None, MODELS)
    assert scores.clip is not None
    assert scores.clip.ceiling == pytest.approx(ceiling, abs=1e-3)
    assert scores.clip.difference.mean == -29.5
    assert "may score lower than the base model and be better" in scores.notes["clip"]
    assert "num_caption_samples is 0" in scores.omitted["fidelity"]
    assert scores.models == MODELS
    below = measure_scores(clip, ClipScores([1.0], [2.0]), pairs, None, MODELS)
    assert below.notes == {}


def test_measure_scores_of_model_that_does_not_tell_captions_apart_omits_clip_score(clip: ClipScorer):
    images, captions = zip(*zorp_pairs(), strict=True)
    noise = np.random.default_rng(0).integers(0, 256, (len(images), 64, 64, 3), dtype=np.uint8)
    pairs = [(Image.fromarray(pixels), caption) for pixels, caption in zip(noise, captions, strict=True)]
    scores = measure_scores(clip, ClipScores([40.0], [50.0]), pairs, None, MODELS)
    assert scores.clip is None
    assert "no better with their own captions" in scores.omitted["clip"]


def test_measure_scores_of_zeros_omits_clip_score(clip: ClipScorer):
    scores = measure_scores(clip, ClipScores([0.0, 0.0], [0.0, 0.0]), zorp_pairs(), None, MODELS)
    assert scores.clip is None
    assert "0 for every image" in scores.omitted["clip"]


def test_tells_captions_apart_compares_with_the_other_captions():
    captions = ["a", "b", "c", "d"]
    assert tells_captions_apart(np.eye(4) + 0.1, captions)
    assert not tells_captions_apart(np.roll(np.eye(4), 1, axis=1), captions)
    assert not tells_captions_apart(np.full((4, 4), 0.3), captions)
    assert tells_captions_apart(np.full((4, 4), 0.3), ["a"] * 4)  # cannot be tested


def test_measure_scores_of_few_samples_refuses_cmmd_and_measures_the_rest(clip: ClipScorer):
    scores = measure_scores(clip, ClipScores([50.0], [60.0]), [], caption_features(), MODELS)
    assert scores.cmmd_base is not None
    assert scores.cmmd_base.status == "refused"
    assert scores.fidelity is not None
    assert scores.diversity is not None
    assert scores.omitted == {}


def test_measure_scores_without_readable_training_image_keeps_diversity(clip: ClipScorer):
    samples = caption_features()
    empty = embedding_features(np.empty((0, 8)), ())
    samples = CaptionFeatures(samples.captions, samples.base, samples.lora, empty)
    scores = measure_scores(clip, ClipScores([50.0], [60.0]), [], samples, MODELS)
    assert (scores.cmmd_lora, scores.fidelity) == (None, None)
    assert set(scores.omitted) == {"cmmd", "fidelity"}
    assert scores.diversity is not None
