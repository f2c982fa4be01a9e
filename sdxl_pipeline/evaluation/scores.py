"""Scores of generated images, each of the base model and the trained model, paired by prompt and seed.

CLIP score: prompt following. CMMD: distance to the training images. Subject fidelity: similarity to the training images, as in DreamBooth
(Ruiz et al. 2023), beside the similarity of the training images to each other. Diversity: distance between images of one prompt.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from sdxl_pipeline.evaluation.clip_score import ClipScorer, matching_margins
from sdxl_pipeline.evaluation.cmmd import measure_cmmd
from sdxl_pipeline.evaluation.image_features import ImageFeatures
from sdxl_pipeline.runtime.evaluation_report import PairedDifference, ScorePair, Scores

MATCHING_PAIRS = 32
"""Training images whose captions the CLIP model has to separate before its score is reported."""


@dataclass(frozen=True)
class GalleryPair:
    """The two models' images of one prompt and seed."""

    prompt: str
    base: Image.Image
    lora: Image.Image


@dataclass(frozen=True)
class ClipScores:
    """100 * max(cosine, 0) of the gallery's images, both lists in its order."""

    base: list[float]
    lora: list[float]


@dataclass(frozen=True)
class CaptionFeatures:
    """Features of the images generated from training captions, in one order, and of the training images."""

    captions: Sequence[str]
    base: ImageFeatures
    lora: ImageFeatures
    training: ImageFeatures


def score_gallery(clip: ClipScorer, gallery: Sequence[GalleryPair]) -> ClipScores:
    """Return the CLIP scores of a gallery."""
    prompts = [pair.prompt for pair in gallery]
    return ClipScores(
        base=clip.scores([pair.base for pair in gallery], prompts),
        lora=clip.scores([pair.lora for pair in gallery], prompts),
    )


def measure_scores(
    clip: ClipScorer,
    gallery: ClipScores,
    training_pairs: Sequence[tuple[Image.Image, str]],
    samples: CaptionFeatures | None,
    models: Mapping[str, str],
) -> Scores:
    """Return every score that can be measured, and for the others why they are omitted.

    `training_pairs` are up to MATCHING_PAIRS training images with different captions; without caption samples (num_caption_samples 0)
    `samples` is None and there is only the CLIP score. `models` are the scoring models' names, for the report.
    """
    omitted, notes = {}, {}
    cosines = None
    if training_pairs:
        images, captions = (list(values) for values in zip(*training_pairs, strict=True))
        cosines = clip.cosine_similarity(images, captions).double().numpy()
        if not separates_captions(cosines, captions):
            omitted["clip"] = (
                "CLIP score: not reported, because the CLIP model matches the training images no better with their own captions than with "
                "each other's. Set pretrained_evaluation_model_name_or_path to a model that knows such images"
            )
    if not any(gallery.base + gallery.lora):
        omitted.setdefault("clip", "CLIP score: not reported, because it is 0 for every image of both models")
    clip_pair = None
    if "clip" not in omitted:
        ceiling = None if cosines is None else float(100 * np.diagonal(cosines).clip(min=0).mean())
        clip_pair = paired_score(gallery.base, gallery.lora, ceiling)
        if ceiling is not None and clip_pair.base > ceiling:
            notes["clip"] = (
                f"The training images score {ceiling:.1f} with their own captions, less than the base model's images: a LoRA that has "
                "learned them may score lower than the base model and be better"
            )
    if samples is None:
        reason = "not measured, since num_caption_samples is 0"
        omitted |= {name: f"{label}: {reason}" for name, label in _SAMPLE_SCORES.items()}
        return Scores(clip=clip_pair, models=dict(models), omitted=omitted, notes=notes)
    if not len(samples.training):
        reason = "not measured, since no training image can be read any more"
        omitted |= {name: f"{_SAMPLE_SCORES[name]}: {reason}" for name in ("cmmd", "fidelity")}
    cmmd_base, cmmd_lora = (
        measure_cmmd(images.clip, balanced_reference(samples.training, images))
        if len(samples.training) and images.clip is not None
        else None
        for images in (samples.base, samples.lora)
    )
    diversity = measure_diversity(samples)
    if diversity is None:
        omitted["diversity"] = "Diversity: not measured, since caption_sample_seeds is 1"
    return Scores(
        clip=clip_pair,
        cmmd_base=cmmd_base,
        cmmd_lora=cmmd_lora,
        fidelity=measure_fidelity(samples) if len(samples.training) else None,
        diversity=diversity,
        models=dict(models),
        omitted=omitted,
        notes=notes,
    )


_SAMPLE_SCORES: Final = {"cmmd": "CMMD", "fidelity": "Subject fidelity", "diversity": "Diversity"}


def separates_captions(cosines: np.ndarray, captions: Sequence[str]) -> bool:
    """Return whether images match their own captions better than others by more than two standard errors, (images, captions).

    True where this cannot be tested, with fewer than two captions.
    """
    margins = matching_margins(cosines, captions)
    if margins is None or len(margins) < 2:
        return True
    return bool(margins.mean() > 2 * margins.std(ddof=1) / math.sqrt(len(margins)))


def measure_fidelity(samples: CaptionFeatures) -> ScorePair:
    """Return the mean cosine of each generated image with the training images of its caption's dataset, paired by caption and seed.

    `ceiling` is that of the training images with the others of their dataset, weighted like the generated ones (None if a dataset has one
    image). Above it, generated images are more alike than the training set is.
    """
    training = samples.training
    vectors = _embeddings(training)
    by_dataset = {name: vectors[_references(training, name)] for name in samples.base.dataset_ids}

    def similarities(images: ImageFeatures) -> list[float]:
        embeds = _embeddings(images)
        return [
            float(by_dataset[name].mean(axis=0) @ vector)
            for name, vector in zip(images.dataset_ids, embeds, strict=True)
        ]

    own = {name: mean_cosine_to_others(embeds) for name, embeds in by_dataset.items() if len(embeds) > 1}
    ceiling = None
    if len(own) == len(by_dataset):
        ceiling = statistics.fmean(own[name] for name in samples.base.dataset_ids)
    return paired_score(similarities(samples.base), similarities(samples.lora), ceiling)


def measure_diversity(samples: CaptionFeatures) -> ScorePair | None:
    """Return the mean cosine distance between images of one caption over its seeds, paired by caption; None with one seed per caption.

    It falls when a model is trained too far (reference: distances between samples of one prompt, Ruiz et al. 2023, DIV).
    """
    groups: dict[str, list[int]] = {}
    for index, caption in enumerate(samples.captions):
        groups.setdefault(caption, []).append(index)
    groups = {caption: indices for caption, indices in groups.items() if len(indices) > 1}
    if not groups:
        return None

    def distances(images: ImageFeatures) -> list[float]:
        embeds = _embeddings(images)
        return [1 - mean_cosine_to_others(embeds[indices]) for indices in groups.values()]

    return paired_score(distances(samples.base), distances(samples.lora))


def mean_cosine_to_others(embeds: np.ndarray) -> float:
    """Return the mean cosine over all pairs of different rows, unit vectors (n, D) with n > 1."""
    n = len(embeds)
    total = embeds.sum(axis=0)
    return float((total @ total - (embeds * embeds).sum()) / (n * (n - 1)))


def balanced_reference(training: ImageFeatures, generated: ImageFeatures) -> np.ndarray:
    """Return CLIP embeddings of training images, (n, D), with as many of each dataset, relative to the others, as generated images.

    CMMD compares means, and would otherwise measure that one dataset is larger than another. The images of a dataset are taken in the
    order of their keys, which are digests.
    """
    if training.clip is None:
        raise ValueError("CMMD needs CLIP embeddings")
    target = {name: generated.dataset_ids.count(name) for name in dict.fromkeys(generated.dataset_ids)}
    available = {name: _references(training, name) for name in target}
    factor = min(len(available[name]) / count for name, count in target.items())
    chosen = [available[name][: max(1, math.floor(factor * count))] for name, count in target.items()]
    return training.clip[np.concatenate(chosen)]


def _references(training: ImageFeatures, dataset_id: str) -> np.ndarray:
    """Return the indices of a dataset's training images, or of all if none of them could be read."""
    indices = training.of_dataset(dataset_id)
    return indices if len(indices) else np.arange(len(training))


def _embeddings(images: ImageFeatures) -> np.ndarray:
    if images.similarity is None:
        raise ValueError("the score needs embeddings")
    return images.similarity


def paired_score(base: Sequence[float], lora: Sequence[float], ceiling: float | None = None) -> ScorePair:
    """Return both means and the mean of the paired differences, trained minus base, with its standard error over the pairs."""
    differences = [after - before for before, after in zip(base, lora, strict=True)]
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    mean = statistics.fmean(differences)
    return ScorePair(
        base=statistics.fmean(base),
        lora=statistics.fmean(lora),
        difference=PairedDifference(images=count, mean=mean, standard_error=error),
        ceiling=ceiling,
    )
