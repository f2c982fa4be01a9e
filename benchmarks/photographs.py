"""Real images without a download: different crops of the photographs in scikit-image's wheel."""

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image
from skimage import data

NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
SUBJECTS = [
    "a person",
    "a cat",
    "a cup",
    "galaxies",
    "tissue",
    "a motorcycle",
    "an engine",
    "an eye",
    "a rocket",
]


@lru_cache
def _photograph(name: str) -> Image.Image:
    return Image.open(Path(data.__file__).parent / name).convert("RGB")


def pieces(count: int, seed: int = 0) -> Iterator[tuple[Image.Image, str]]:
    """Yield `count` crops of photographs with a caption each: 256 to 768 pixels on the longer edge, of five aspect ratios."""
    rng = random.Random(seed)
    for number in range(count):
        source = number % len(NAMES)
        photograph = _photograph(NAMES[source])
        aspect = rng.choice((1.0, 1.5, 2 / 3, 4 / 3, 0.75))
        width = rng.uniform(0.4, 1.0) * min(photograph.width, photograph.height * aspect)
        height = width / aspect
        left = rng.uniform(0, photograph.width - width)
        top = rng.uniform(0, photograph.height - height)
        scale = rng.uniform(256, 768) / max(width, height)
        size = (max(64, round(width * scale)), max(64, round(height * scale)))
        box = (left, top, left + width, top + height)
        yield (
            photograph.resize(size, Image.Resampling.LANCZOS, box=box),
            f"a photo of {SUBJECTS[source]}, detail {number}",
        )


def write_dataset(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` JPEGs with a caption file each, unless they exist."""
    if folder.is_dir() and sum(1 for _ in folder.glob("*.jpg")) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption) in enumerate(pieces(count, seed)):
        image.save(folder / f"{number:05d}.jpg", quality=92)
        (folder / f"{number:05d}.txt").write_text(caption + "\n", encoding="utf-8")
