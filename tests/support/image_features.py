"""Features of images from arrays and of the demo's zorps, without a stage."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.demo.demo_dataset import zorp
from sdxl_pipeline.demo.render import render, to_image
from sdxl_pipeline.evaluation.image_features import ImageFeatures

TRAIN_ZORPS = [
    (color, background, place)
    for color in ("red", "green", "blue")
    for background in ("yellow", "black")
    for place in ("left", "centre", "right")
]
UNSEEN_ZORPS = [
    (color, "blue", place) for color in ("purple", "orange") for place in ("top", "bottom", "left")
]


def render_zorp(
    parameters: tuple[str, str, str], seed: int = 0, size: tuple[int, int] = (96, 96)
) -> np.ndarray:
    """Return a zorp of (colour, background, place) as uint8 (H, W, 3); the seed moves and scales it a little."""
    return np.asarray(to_image(render([zorp(*parameters)], size, random.Random(seed))[0]).convert("RGB"))


def save_images(folder: Path, images: Sequence[np.ndarray]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:02d}.png" for number in range(len(images))]
    for file, pixels in zip(files, images, strict=True):
        Image.fromarray(pixels).save(file)
    return files


def embedding_features(embeds: np.ndarray, dataset_ids: Sequence[str] = ()) -> ImageFeatures:
    """Return features with these vectors, normalized, as embeddings of both models, and no pixels."""
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    names = tuple(f"{number:02d}.png" for number in range(len(unit)))
    return ImageFeatures(
        dataset_ids=tuple(dataset_ids) or ("shapes",) * len(unit),
        names=names,
        files=tuple(map(Path, names)),
        clip=unit,
        similarity=unit,
        luma=np.zeros((len(unit), 1), np.float32),
        first_crops=np.arange(len(unit)),
    )
