"""What is compared of images: embeddings, and small grey pixels for a comparison that needs no model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.decoding.pixels import load_crops
from sdxl_pipeline.evaluation.embeddings import ScoringModels
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.training.data.samples import Samples

LUMA_EDGE = 64

MAX_TRAINING_CROPS = 2000
"""Crops of training images that generated images are compared with, the first by key."""


@dataclass(frozen=True)
class SourceImage:
    """An image to measure."""

    dataset_id: str
    name: str
    """Path within its dataset, or the name of a generated image."""
    file: Path
    crops: tuple[np.ndarray, ...]
    """Pixels of its crops, uint8 (H, W, 3); the first is embedded."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of n images."""

    dataset_ids: tuple[str, ...]
    names: tuple[str, ...]
    files: tuple[Path, ...]
    clip: np.ndarray | None
    """CLIP embeddings of unit length, (n, D); None without scoring models."""
    similarity: np.ndarray | None
    """Embeddings of the similarity model, likewise."""
    luma: np.ndarray
    """Grey pixels of every crop with mean 0 and norm 1, float32 (crops, 64 * 64); 0 for a crop of one colour."""
    first_crops: np.ndarray
    """Index of each image's first row in `luma`, int64 (n,)."""

    def __len__(self) -> int:
        return len(self.names)

    def of_dataset(self, dataset_id: str) -> np.ndarray:
        """Return the indices of a dataset's images."""
        return np.flatnonzero(np.asarray(self.dataset_ids, dtype=object) == dataset_id)


def measure_features(images: Iterable[SourceImage], models: ScoringModels | None) -> ImageFeatures:
    """Return the features of images, which are read one after the other; without `models` only their pixels."""
    sources: list[tuple[str, str, Path]] = []
    embedded: list[tuple[np.ndarray, np.ndarray]] = []
    luma: list[np.ndarray] = []
    first_crops: list[int] = []
    for image in images:
        first_crops.append(len(luma))
        luma += [grey_pixels(crop) for crop in image.crops]
        if models is not None:
            embedded.append(models.embed(Image.fromarray(image.crops[0])))
        sources.append((image.dataset_id, image.name, image.file))
    dataset_ids, names, files = zip(*sources, strict=True) if sources else ((), (), ())
    clip = similarity = None
    if embedded:
        clip, similarity = (np.stack(vectors) for vectors in zip(*embedded, strict=True))
    return ImageFeatures(
        dataset_ids=dataset_ids,
        names=names,
        files=files,
        clip=clip,
        similarity=similarity,
        luma=np.stack(luma) if luma else np.empty((0, LUMA_EDGE**2), np.float32),
        first_crops=np.array(first_crops, np.int64),
    )


def read_images(samples: Samples, datasets: Sequence[TrainingDataset]) -> Iterator[SourceImage]:
    """Yield the images of samples with all their crops, the unflipped ones first; copies of one content in a dataset count once.

    Images that cannot be read any more are skipped.
    """
    folders = {dataset.dataset_id: Path(dataset.data_dir) for dataset in datasets}
    for (dataset_id, _), group in groupby(samples, key=lambda sample: (sample.dataset_id, sample.key)):
        crops = list(group)
        file = folders[dataset_id] / crops[0].path
        distinct = {sample.crop: None for sample in sorted(crops, key=lambda sample: sample.crop.flipped)}
        try:
            pixels = load_crops(file, list(distinct))
        except UnreadableImage:
            continue
        yield SourceImage(dataset_id, crops[0].path, file, tuple(pixels))


def grey_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, 3) as grey values of 64 x 64 with mean 0 and norm 1, float32 (64 * 64,); 0 if all are equal."""
    small = Image.fromarray(pixels).convert("L").resize((LUMA_EDGE, LUMA_EDGE), Image.Resampling.BOX)
    centred = np.asarray(small, np.float32).ravel()
    centred = centred - centred.mean()
    norm = np.linalg.norm(centred)
    return centred / norm if norm > 1e-3 else np.zeros_like(centred)


def correlation(images: ImageFeatures, references: ImageFeatures) -> np.ndarray:
    """Return the normalized cross-correlation of every image's first crop with every reference, in [-1, 1]: (images, references).

    The highest value over the reference's crops and their mirror images.
    """
    if not len(images) or not len(references):
        return np.empty((len(images), len(references)))
    first = images.luma[images.first_crops]  # (images, 64 * 64)
    mirrored = first.reshape(-1, LUMA_EDGE, LUMA_EDGE)[:, :, ::-1].reshape(len(first), -1)
    by_crop = np.maximum(first @ references.luma.T, mirrored @ references.luma.T)  # (images, crops)
    return np.maximum.reduceat(by_crop, references.first_crops, axis=1).astype(np.float64)


def cosine(images: ImageFeatures, references: ImageFeatures) -> np.ndarray | None:
    """Return the cosine similarity of every image with every reference: (images, references). None without embeddings."""
    if images.similarity is None or references.similarity is None:
        return None
    return images.similarity @ references.similarity.T
