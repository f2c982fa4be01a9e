"""The world of captioned shapes: possible image contents, their sampling, and held-out combinations.

A plain image is one shape in one colour on one background, in one of two sizes at one of five places. Rich
images add elements of new concepts: outlines, striped and dotted fills, a mark inside the shape (a smaller shape,
one eye, two eyes) and free-form silhouettes with invented words.
"""

import math
import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal

Split = Literal["train", "held_out"]
Pattern = Literal["solid", "striped", "dotted"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (140, 50, 180),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "heart", "star", "moon", "arrow")
# The radius of a shape as a share of the square root of the image's area.
SIZES = {"small": 0.14, "large": 0.25}
_LARGE_SHARE = 0.55  # large images teach shapes best
# Centre of the shape as (x, y) shares of the image.
PLACES = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "centre": (0.5, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
}
# (height, width): areas of about 128x128; edges are multiples of 32, as required by the f8 VAE and two UNet downsamplings.
BUCKETS: tuple[tuple[int, int], ...] = ((128, 128), (96, 160), (160, 96))

# Shapes with room for a mark in the middle, and shapes that are recognizable at a third of the size.
_MARKABLE = ("circle", "square", "triangle", "diamond", "cross", "heart", "star", "freeform")
MARK_SHAPES = ("circle", "square", "triangle", "diamond", "heart", "star")
_CONSONANTS, _VOWELS = "bcdfgklmnprstvxz", "aeiou"
# Words of demo projects, which the world never uses, so that they are new to the model.
RESERVED_WORDS = frozenset({"zorp"})


@dataclass(frozen=True)
class FreeForm:
    """A silhouette in polar form: a wave of `lobes` periods on a circle, plus low-frequency dents."""

    lobes: int
    depth: float
    phase: float
    pointed: bool
    dents: tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A mark in the middle of a shape: a small `shape` of `color`, or `eyes` white eyes with pupils.

    Eyes in the world have `scale` 1.
    """

    shape: str | None = None
    color: str = "white"
    eyes: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Spec:
    """Content of one image of the world.

    Colours are keys of COLORS; `noun` replaces the shape's name; `outline_width` is a share of the radius, random
    if None.
    """

    shape: str
    color: str
    background: str
    size: str
    place: str
    outline: str | None = None
    pattern: Pattern = "solid"
    second_color: str | None = None
    mark: Mark | None = None
    freeform: FreeForm | None = None
    noun: str | None = None
    outline_width: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the spec has only shape, colour, background, size and place."""
        return self == Spec(self.shape, self.color, self.background, self.size, self.place)


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Return whether a (shape, colour, background) triple is excluded from training: a twelfth, chosen by checksum."""
    return zlib.crc32(f"{shape}/{color}/{background}".encode()) % 12 == 0


def sample_plain(rng: random.Random, split: Split | None = "train") -> Spec:
    """Sample a plain image of `split` (None: of either)."""
    while True:
        color, background = rng.sample(list(COLORS), 2)
        shape = rng.choice(SHAPES)
        if split is not None and is_held_out(shape, color, background) != (split == "held_out"):
            continue
        size = "large" if rng.random() < _LARGE_SHARE else "small"
        return Spec(shape, color, background, size, rng.choice(list(PLACES)))


def sample_rich(rng: random.Random) -> Spec:
    """Sample a training image with at least one of: free-form silhouette, outline, pattern, mark."""
    spec = sample_plain(rng)
    if rng.random() < 0.2:
        noun = "shape" if rng.random() < 0.3 else invented_word(rng)
        spec = replace(spec, shape="freeform", freeform=sample_freeform(rng), noun=noun)
    extras = [rng.random() < p for p in (0.45, 0.3, 0.4)]
    if not any(extras) and spec.freeform is None:
        extras[rng.randrange(3)] = True
    with_outline, with_pattern, with_mark = extras
    if with_outline:
        spec = replace(spec, outline=_other_color(rng, spec.color, spec.background))
    if with_pattern:
        pattern: Pattern = rng.choice(("striped", "dotted"))
        spec = replace(spec, pattern=pattern, second_color=_other_color(rng, spec.color, spec.background))
    if with_mark and spec.shape in _MARKABLE:
        spec = replace(spec, size="large", mark=_sample_mark(rng, spec.color))
    return spec


def sample_world(rng: random.Random, rich_share: float) -> Spec:
    """Sample a training image: rich with probability `rich_share`, plain otherwise."""
    return sample_rich(rng) if rng.random() < rich_share else sample_plain(rng)


def held_out_specs(count: int, seed: int) -> list[Spec]:
    """Return `count` distinct plain images of the held-out split, in an order determined by `seed`.

    Raises ValueError if the split has fewer.
    """
    specs = [
        Spec(shape, color, background, size, place)
        for shape in SHAPES
        for color in COLORS
        for background in COLORS
        if color != background and is_held_out(shape, color, background)
        for size in SIZES
        for place in PLACES
    ]
    if count > len(specs):
        raise ValueError(f"the held-out split has {len(specs)} plain images, {count} were requested")
    random.Random(seed).shuffle(specs)
    return specs[:count]


def sample_freeform(rng: random.Random) -> FreeForm:
    """Sample a silhouette with 2 to 7 lobes or points."""
    first, second, third, fourth = (rng.gauss(0, 0.05) for _ in range(4))
    return FreeForm(
        lobes=rng.choice((2, 3, 4, 5, 6, 7)),
        depth=rng.uniform(0.05, 0.45),
        phase=rng.uniform(0, 2 * math.pi),
        pointed=rng.random() < 0.5,
        dents=(first, second, third, fourth),
    )


def invented_word(rng: random.Random) -> str:
    """Return a pronounceable word of one or two syllables that is neither reserved nor a name in the world."""
    while True:
        word = "".join(
            rng.choice(_CONSONANTS)
            + rng.choice(_VOWELS)
            + (rng.choice(_CONSONANTS) if rng.random() < 0.6 else "")
            for _ in range(rng.choice((1, 2, 2)))
        )
        if len(word) > 2 and word not in RESERVED_WORDS and word not in COLORS and word not in SHAPES:
            return word


def sample_frame(rng: random.Random, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """Sample (original height, original width, crop top, crop left) for an image in `bucket` (h, w).

    Seven in ten are the bucket itself or a multiple of it, uncropped; the others have another aspect, are
    resized to cover the bucket and cropped. These four and the bucket's size are SDXL's time ids (Podell et al.
    2023, section 2.2), which the model thereby learns.
    """
    height, width = bucket
    if rng.random() < 0.7:
        factor = rng.choice((1, 1, 1, 1.5, 2))
        return int(height * factor), int(width * factor), 0, 0
    original_h, original_w = rng.randint(112, 256), rng.randint(112, 256)
    scale = max(height / original_h, width / original_w)
    top = int(rng.random() * (original_h * scale - height))
    left = int(rng.random() * (original_w * scale - width))
    return original_h, original_w, top, left


def _other_color(rng: random.Random, *excluded: str) -> str:
    return rng.choice([color for color in COLORS if color not in excluded])


def _sample_mark(rng: random.Random, body: str) -> Mark:
    if body != "white" and rng.random() < 0.5:
        return Mark(eyes=rng.choice((1, 2)))
    return Mark(shape=rng.choice(MARK_SHAPES), color=_other_color(rng, body))
