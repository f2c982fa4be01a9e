"""CMMD equals an independent computation and its closed form, is unbiased, and is refused for too few images."""

import math

import numpy as np
import pytest

from sdxl_pipeline.evaluation.cmmd import (
    CERTAIN_IMAGES,
    MIN_IMAGES,
    kernel_matrix,
    measure_cmmd,
    unbiased_cmmd,
)


def embeddings(count: int, shift: float = 0.0, seed: int = 0, width: int = 32) -> np.ndarray:
    """Return random unit vectors around a common direction, which `shift` turns."""
    rng = np.random.default_rng(seed)
    centre = np.zeros(width)
    centre[:2] = math.cos(shift), math.sin(shift)
    vectors = centre + 0.2 * rng.normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow_cmmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased estimate from the definition, pair by pair."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 200)

    def within(vectors: np.ndarray) -> float:
        pairs = [(i, j) for i in range(len(vectors)) for j in range(len(vectors)) if i != j]
        return sum(kernel(vectors[i], vectors[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y) for x in first for y in second) / (len(first) * len(second))
    return 1000 * (within(first) + within(second) - 2 * between)


def test_cmmd_equals_definition_pair_by_pair():
    first, second = embeddings(17, seed=1), embeddings(20, shift=0.4, seed=2)
    assert measure_cmmd(first, second).value == pytest.approx(slow_cmmd(first, second), abs=1e-9)


def test_cmmd_equals_closed_form_of_mean_embeddings():
    """With sigma 10 the kernel of unit vectors is linear to a per cent, so that only the means count."""
    first, second = embeddings(200, seed=1), embeddings(150, shift=0.8, seed=2)
    difference = first.mean(axis=0) - second.mean(axis=0)
    variances = sum((1 - mean @ mean) / (n - 1) for mean, n in ((first.mean(0), 200), (second.mean(0), 150)))
    closed_form = 10 * (difference @ difference - variances)
    assert closed_form > 1
    assert measure_cmmd(first, second).value == pytest.approx(closed_form, rel=0.02)


def test_cmmd_of_equal_distributions_is_0_on_average():
    """The estimate that counts an image with itself is larger by 10 (1 - c) (1/m + 1/n)."""
    m, n, unbiased, biased = 16, 24, [], []
    for seed in range(200):
        kernel = kernel_matrix(embeddings(m + n, seed=seed))
        chosen = (np.arange(m + n) < m).astype(float)[None]
        unbiased.append(unbiased_cmmd(kernel, chosen, 1 - chosen)[0])
        means = kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()
        biased.append(1000 * means)
    error = np.std(unbiased) / math.sqrt(len(unbiased))
    assert abs(np.mean(unbiased)) < 3 * error
    vectors = embeddings(2000, seed=999)
    cosine = float((np.sum(vectors, axis=0) ** 2).sum() - 2000) / (2000 * 1999)
    assert np.mean(biased) == pytest.approx(10 * (1 - cosine) * (1 / m + 1 / n), rel=0.05)


def test_p_value_is_small_for_different_sets_and_uniform_for_equal_ones():
    assert measure_cmmd(embeddings(20, seed=1), embeddings(20, shift=0.5, seed=2)).p_value == pytest.approx(
        1 / 1001
    )
    p_values = [
        measure_cmmd(embeddings(16, seed=2 * seed), embeddings(16, seed=2 * seed + 1)).p_value or 0
        for seed in range(20)
    ]
    assert 0.3 < np.mean(p_values) < 0.7
    assert min(p_values) > 1 / 1001


def test_unbiased_cmmd_of_resampled_sets_never_pairs_an_image_with_itself():
    first, second = embeddings(8, seed=1), embeddings(7, shift=0.6, seed=2)
    kernel = kernel_matrix(np.concatenate([first, second]))
    chosen = np.array([0, 0, 1, 2, 5, 5, 5, 7]), np.array([8, 9, 9, 14, 10, 11, 12])
    counts = [np.bincount(indices, minlength=15).astype(float)[None] for indices in chosen]
    within = [np.mean([kernel[a, b] for a in indices for b in indices if a != b]) for indices in chosen]
    expected = 1000 * (sum(within) - 2 * kernel[np.ix_(*chosen)].mean())
    assert unbiased_cmmd(kernel, *counts)[0] == pytest.approx(expected)


def test_interval_contains_value_and_repeats():
    first, second = embeddings(40, seed=1), embeddings(40, shift=0.3, seed=2)
    result = measure_cmmd(first, second)
    assert result.value is not None
    assert result.interval is not None
    assert result.interval[0] < result.value < result.interval[1]
    assert measure_cmmd(first, second) == result


@pytest.mark.parametrize(
    ("generated", "training", "status"),
    [
        (MIN_IMAGES - 1, 100, "refused"),
        (100, MIN_IMAGES - 1, "refused"),
        (MIN_IMAGES, 100, "uncertain"),
        (100, CERTAIN_IMAGES - 1, "uncertain"),
        (CERTAIN_IMAGES, CERTAIN_IMAGES, "measured"),
    ],
)
def test_cmmd_status_follows_number_of_images(generated: int, training: int, status: str):
    result = measure_cmmd(embeddings(generated, seed=1), embeddings(training, seed=2))
    assert result.status == status
    assert result.images == (generated, training)
    assert (result.value is None) == (result.p_value is None) == (status == "refused")
    assert ("uncertain" in result.text) == (status == "uncertain")
    assert ("not reported" in result.text) == (status == "refused")
    # a p-value is not the probability that the sets are alike
    assert ("as large if both sets were alike" in result.text) == (status != "refused")
