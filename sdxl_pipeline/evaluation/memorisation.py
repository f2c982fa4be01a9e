"""Memorisation: copies of training images among the images that the trained model generates from training captions.

A generated image is a copy if it is nearer to a training image than training images are to each other, both by embedding and by pixels
(Somepalli et al. 2023 and Carlini et al. 2023 use one fixed similarity each). Both limits are calibrated on the training images of the
nearest one's dataset, since ten photos of one cup resemble each other more than a hundred paintings do. A copy also has to be nearer to
the training images than to the held-out ones, by more than a typical held-out image is: an image that both resemble equally is
generalisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl_pipeline.data.quality.contact_sheets import grouped_sheet
from sdxl_pipeline.evaluation.image_features import ImageFeatures, correlation, cosine
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.runtime.evaluation_report import Memorisation, MemorisedPair

SHEET_NAME = "memorisation.png"
SHEET_PAIRS, SHEET_TILE = 12, 224

MIN_SIMILARITY, MIN_CORRELATION = 0.8, 0.8
"""Below these an image is no copy, however different the training images are from each other."""

FIXED_SIMILARITY, FIXED_CORRELATION = 0.9, 0.9
"""The limits where there are too few training images to calibrate on."""

DUPLICATE_SIMILARITY, DUPLICATE_CORRELATION = 0.99, 0.98
"""Training images that are this near count as one, and are not calibrated on; the limits are never higher."""

MIN_CALIBRATION_IMAGES = 3
"""Fewer training images, near duplicates counted as one, say nothing about how near different ones are."""

MAXIMUM_BELOW_IMAGES = 20
"""With fewer the limit is the maximum over the training images instead of their 99th percentile."""

MIN_HELD_OUT_IMAGES = 4
"""With fewer held-out images, copies are not compared with them."""


@dataclass(frozen=True)
class CopyLimits:
    """A copy is above both."""

    similarity: float
    correlation: float
    images: int
    """Training images calibrated on; 0 for the fixed limits."""


def check_memorisation(
    generated: ImageFeatures,
    training: ImageFeatures,
    held_out: ImageFeatures,
    limit: float,
    output_dir: Path,
) -> Memorisation:
    """Compare each generated image with its nearest training image, and write the pairs to memorisation.png in `output_dir`.

    `limit` is the share of copies that is still accepted. `held_out` may be empty. Raises ValueError without generated or training images.
    """
    if not len(generated) or not len(training):
        raise ValueError("memorisation needs generated images and training images")
    similarities, correlations = cosine(generated, training), correlation(generated, training)
    limits = _limits_by_dataset(training)
    of_image = [limits[name] for name in training.dataset_ids]
    excess = correlations - np.array([each.correlation for each in of_image])  # (generated, training)
    if similarities is not None:
        excess = np.minimum(excess, similarities - np.array([each.similarity for each in of_image]))
    nearest = excess.argmax(axis=1)
    flagged = (excess.max(axis=1) > 0) & _nearer_to_training(generated, training, held_out)
    pairs = [
        MemorisedPair(
            image_path=str(generated.files[row]),
            nearest=f"{training.dataset_ids[index]}/{training.names[index]}",
            similarity=None if similarities is None else float(similarities[row, index]),
            correlation=float(correlations[row, index]),
            flagged=bool(flagged[row]),
        )
        for row, index in enumerate(nearest)
    ]
    order = sorted(range(len(pairs)), key=lambda row: (not flagged[row], -pairs[row].correlation))
    sheet_path = output_dir / SHEET_NAME
    _write_sheet([(pairs[row], training.files[nearest[row]]) for row in order], sheet_path)
    calibrated_on = sum(each.images for each in limits.values())
    return Memorisation(
        samples=len(pairs),
        flagged=int(flagged.sum()),
        limit=limit,
        calibrated_on=calibrated_on,
        pairs=tuple(pairs[row] for row in order),
        sheet_path=str(sheet_path),
        text=_text(int(flagged.sum()), len(pairs), limit, limits, uses_embeddings=similarities is not None),
    )


def _limits_by_dataset(training: ImageFeatures) -> dict[str, CopyLimits]:
    correlations, similarities = correlation(training, training), cosine(training, training)
    limits = {}
    for name in dict.fromkeys(training.dataset_ids):
        block = np.ix_(*2 * (training.of_dataset(name),))
        limits[name] = calibrate(correlations[block], None if similarities is None else similarities[block])
    return limits


def calibrate(correlations: np.ndarray, similarities: np.ndarray | None) -> CopyLimits:
    """Return the limits of a dataset: the 99th percentile over its images of the similarity to the nearest other one.

    Both arguments are (n, n), between its training images; `similarities` is None without embeddings.
    """
    similarities = np.ones_like(correlations) if similarities is None else similarities
    same = (correlations >= DUPLICATE_CORRELATION) & (similarities >= DUPLICATE_SIMILARITY)
    np.fill_diagonal(same, True)
    # the first of each group of near duplicates represents it
    distinct = np.flatnonzero(~np.tril(same, -1).any(axis=1))
    if len(distinct) < MIN_CALIBRATION_IMAGES:
        return CopyLimits(FIXED_SIMILARITY, FIXED_CORRELATION, 0)

    def nearest(values: np.ndarray) -> float:
        values = values[np.ix_(distinct, distinct)]
        of_image = np.where(np.eye(len(distinct), dtype=bool), -np.inf, values).max(axis=1)
        return float(of_image.max() if len(distinct) < MAXIMUM_BELOW_IMAGES else np.quantile(of_image, 0.99))

    return CopyLimits(
        similarity=min(max(nearest(similarities), MIN_SIMILARITY), DUPLICATE_SIMILARITY),
        correlation=min(max(nearest(correlations), MIN_CORRELATION), DUPLICATE_CORRELATION),
        images=len(distinct),
    )


def _nearer_to_training(
    generated: ImageFeatures, training: ImageFeatures, held_out: ImageFeatures
) -> np.ndarray:
    """Return for each generated image whether it is nearer to the training images than a typical held-out image is: (images,).

    Nearer means similarity to the nearest training image minus similarity to the nearest (other) held-out image.
    """
    if len(held_out) < MIN_HELD_OUT_IMAGES:
        return np.ones(len(generated), bool)

    def near(images: ImageFeatures, references: ImageFeatures) -> np.ndarray:
        similarities = cosine(images, references)
        values = correlation(images, references) if similarities is None else similarities
        if images is references:
            np.fill_diagonal(values, -np.inf)
        return values.max(axis=1)

    typical = np.median(near(held_out, training) - near(held_out, held_out))
    margin: np.ndarray = near(generated, training) - near(generated, held_out)
    return margin > typical


def _write_sheet(pairs: Sequence[tuple[MemorisedPair, Path]], path: Path) -> None:
    """Write generated images beside their nearest training images as a PNG, for the evaluation's folder only: it shows training images."""
    groups = []
    for pair, nearest in pairs[:SHEET_PAIRS]:
        similarity = "" if pair.similarity is None else f"similarity {pair.similarity:.3f}, "
        title = f"{'copy: ' if pair.flagged else ''}{similarity}correlation {pair.correlation:.3f}"
        groups.append([(Path(pair.image_path), title), (nearest, f"training image {pair.nearest}")])
    with atomic_path(path) as temporary:
        grouped_sheet(groups, columns=2, tile=SHEET_TILE).save(temporary, format="PNG")


def _text(
    flagged: int, samples: int, limit: float, limits: dict[str, CopyLimits], *, uses_embeddings: bool
) -> str:
    """Return the result and its limits as sentences."""
    by = "by embedding and by pixels" if uses_embeddings else "by pixels alone (evaluation_type is none)"
    sentences = [
        f"{flagged} of {samples} images generated from training captions are copies of a training image, {by}; at most {limit:.0%} are accepted."
    ]
    for name, each in limits.items():
        values = f"correlation {each.correlation:.3f}"
        if uses_embeddings:
            values = f"similarity {each.similarity:.3f} and {values}"
        if each.images:
            source = f"{each.images} different training images of {name}, which are this near to each other"
        else:
            source = f"fixed for {name}, whose training images are too few to calibrate on"
        sentences.append(f"A copy exceeds {values} ({source}).")
    return " ".join(sentences)
