"""Look-alikes: copies that a person would call the same are found, different photographs are not, and no dataset is too large."""

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from sdxl_pipeline.data.quality import near_duplicates, perceptual_hash
from sdxl_pipeline.data.quality.near_duplicates import (
    PerceptualHashes,
    find_leaks,
    find_near_duplicates,
    near_pairs,
)
from tests.support.photographs import PHOTOGRAPHS, encoded

NAMES = ["astronaut", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "ihc", "moon"]


def inset(image: Image.Image, share: float) -> Image.Image:
    width, height = (round(edge * share / 2) for edge in image.size)
    return image.crop((width, height, image.width - width, image.height - height))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality))).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "halved": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "stretched": lambda image: image.resize((image.width, image.height * 9 // 10)),
    "recompressed": lambda image: recompressed(image, 30),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "trimmed": lambda image: inset(image, 0.02),
}


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return {name: Image.open(PHOTOGRAPHS / f"{name}.png").convert("RGB") for name in NAMES}


GREY = "80" * 32
"""Colours of an image without any."""


def look(image: Image.Image) -> str:
    """An image's entry in `phash`, as a scan has it."""
    return perceptual_hash.perceptual_hash(image)


def frame_of(images: dict[str, str], keys: dict[str, str] | None = None) -> pd.DataFrame:
    """A scan of files by name with their hashes, each of its own content unless `keys` says otherwise."""
    return pd.DataFrame(
        {
            "path": list(images),
            "key": [(keys or {}).get(name, name) for name in images],
            "phash": [value if len(value) != 16 else value + GREY for value in images.values()],
            "status": "kept",
        }
    )


def balanced(count: int, seed: int = 0) -> np.ndarray:
    """Hashes of unrelated images: half of the bits set."""
    chosen = np.argsort(np.random.default_rng(seed).random((count, 64)), axis=1) < 32
    return np.packbits(chosen, axis=1).view(">u8").ravel().astype(np.uint64)


def grey(hashes: np.ndarray) -> PerceptualHashes:
    return PerceptualHashes(hashes, np.full((len(hashes), 32), 128, np.uint8))


def flipped(value: np.uint64, *bits: int) -> np.uint64:
    for bit in bits:
        value ^= np.uint64(1) << np.uint64(bit)
    return value


def pairs_of(found: near_duplicates.Pairs) -> dict[tuple[int, int], int]:
    return {
        (int(a), int(b)): int(d) for a, b, d in zip(found.first, found.second, found.distance, strict=True)
    }


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_found_and_different_photographs_are_not(photographs, change):
    hashes = {name: look(image) for name, image in photographs.items()}
    hashes |= {f"{name} {change}": look(COPIES[change](image)) for name, image in photographs.items()}
    found = find_near_duplicates(frame_of(hashes))
    assert {group.paths for group in found.alike} == {(name, f"{name} {change}") for name in NAMES}
    assert (found.same, found.featureless, found.complete) == ((), 0, True)


def test_the_same_bytes_under_several_names_are_told_apart_from_look_alikes():
    first, second, other = "c2924c5532bddfc8", "c2924c5532bddfc1", "3d6db3aacd422037"
    frame = frame_of(
        {"b.png": first, "a.png": first, "near.png": second, "other.png": other, "dropped.png": first},
        keys={"a.png": "1", "b.png": "1"},
    )
    frame.loc[4, "status"] = "dropped"
    found = find_near_duplicates(frame)
    assert found.same == (("a.png", "b.png"),)
    assert [(group.paths, group.distance) for group in found.alike] == [(("a.png", "near.png"), 2)]


def test_one_drawing_in_two_colours_is_two_images():
    def draw(colour: str) -> Image.Image:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse((20, 30, 80, 100), fill=colour)
        return image

    drawn = {
        "red": look(draw("red")),
        "again": look(recompressed(draw("red"), 60)),
        "blue": look(draw("blue")),
    }
    assert drawn["red"][:16] == drawn["blue"][:16]
    assert [group.paths for group in find_near_duplicates(frame_of(drawn)).alike] == [("again", "red")]


def test_neighbours_of_neighbours_are_one_group_and_the_largest_comes_first():
    rare, common = balanced(2)
    chain = [common, flipped(common, *range(6)), flipped(common, *range(12)), flipped(common, *range(16))]
    hashes = {f"c{number}": f"{value:016x}" for number, value in enumerate(chain)}
    hashes |= {"r0": f"{rare:016x}", "r1": f"{rare:016x}"}
    found = find_near_duplicates(frame_of(hashes))
    assert [(group.paths, group.distance) for group in found.alike] == [
        (("c0", "c1", "c2", "c3"), 6),
        (("r0", "r1"), 0),
    ]


def test_images_without_features_are_counted_and_not_compared():
    flat = {f"{colour}.png": look(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")}
    shaded = {"shaded.png": look(Image.linear_gradient("L"))}
    found = find_near_duplicates(frame_of(flat | shaded | {"not looked at.png": ""}))
    assert (found.alike, found.featureless) == ((), 3)
    assert find_near_duplicates(frame_of({})) == near_duplicates.NearDuplicates((), (), 0, True)


@pytest.mark.parametrize("others", [False, True], ids=["within", "between"])
def test_the_search_in_bands_finds_what_comparing_all_finds(monkeypatch, others):
    hashes = balanced(3000)
    random = np.random.default_rng(1)
    planted = np.array(
        [
            flipped(value, *random.choice(64, index % 11, replace=False))
            for index, value in enumerate(hashes[:600])
        ]
    )
    hashes = np.concatenate([hashes, planted])
    arguments = (grey(hashes[:2000]), grey(hashes[1000:])) if others else (grey(hashes),)
    every = pairs_of(near_pairs(*arguments))
    monkeypatch.setattr(near_duplicates, "_ALL_AT_ONCE", 0)
    monkeypatch.setattr(near_duplicates, "_CANDIDATES_AT_ONCE", 1000)
    assert pairs_of(near_pairs(*arguments)) == every
    first, second = (0, 3000 - 1000) if others else (0, 3000)
    for index in range(600):
        assert ((index + first, index + second) in every) == (index % 11 <= 8), index


def test_a_film_ends_the_search_instead_of_filling_the_memory(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 500)
    frames = np.unique([flipped(balanced(1)[0], a, b) for a in range(30) for b in range(30, 60)])
    for at_once in (1 << 26, 0):
        monkeypatch.setattr(near_duplicates, "_ALL_AT_ONCE", at_once)
        found = near_pairs(grey(frames))
        assert (len(found.first), found.complete) == (500, False)
        assert found.distance.max() <= near_duplicates.MAX_DISTANCE
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 10**6)
    assert near_pairs(grey(frames)).complete
    monkeypatch.setattr(near_duplicates, "MAX_CANDIDATES", 10)
    assert not near_pairs(grey(frames)).complete


def test_equal_hashes_however_many_cost_nothing():
    value = f"{balanced(1)[0]:016x}"
    found = find_near_duplicates(frame_of({f"{number:06d}": value for number in range(20_000)}))
    assert [len(group.paths) for group in found.alike] == [20_000]
    assert found.complete


def test_leaks_name_the_training_image_that_is_most_alike():
    value, other = balanced(2)
    train = frame_of(
        {
            "far": f"{flipped(value, 1, 2, 3, 4):016x}",
            "near": f"{flipped(value, 5, 6):016x}",
            "same": f"{other:016x}",
            "unseen": "",
        },
        keys={"same": "s", "unseen": "u"},
    )
    evaluation = frame_of(
        {
            "unlike": f"{~value:016x}",
            "alike": f"{value:016x}",
            "equal": f"{other:016x}",
            "blind": "",
            "new": "",
        },
        keys={"equal": "s", "blind": "u"},
    )
    leaks, complete = find_leaks(train, evaluation)
    assert [(leak.eval_path, leak.train_path, leak.distance, leak.same) for leak in leaks] == [
        ("alike", "near", 2, False),
        ("equal", "same", 0, True),
        ("blind", "unseen", 0, True),
    ]
    assert complete
    assert find_leaks(train, evaluation[:0]) == ([], True)
    assert find_leaks(train[:0], evaluation) == ([], True)
