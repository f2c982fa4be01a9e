"""Tests of near duplicates: modified copies are found, different photographs are not, and the search is bounded."""

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


def cropped(image: Image.Image, share: float) -> Image.Image:
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
    "trimmed": lambda image: cropped(image, 0.02),
}


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return {name: Image.open(PHOTOGRAPHS / f"{name}.png").convert("RGB") for name in NAMES}


GREY = "80" * 32
"""Colour part of a greyscale image's hash."""


def hash_of(image: Image.Image) -> str:
    """Return the `phash` of an image."""
    return perceptual_hash.perceptual_hash(image)


def frame_of(images: dict[str, str], keys: dict[str, str] | None = None) -> pd.DataFrame:
    """Return a scan of files by name with their hashes; `keys` overrides the distinct content keys."""
    return pd.DataFrame(
        {
            "path": list(images),
            "key": [(keys or {}).get(name, name) for name in images],
            "phash": [value if len(value) != 16 else value + GREY for value in images.values()],
            "status": "kept",
        }
    )


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    """Return hashes of unrelated images: half of the bits are set."""
    is_set = np.argsort(np.random.default_rng(seed).random((count, 64)), axis=1) < 32
    return np.packbits(is_set, axis=1).view(">u8").ravel().astype(np.uint64)


def grey_hashes(hashes: np.ndarray) -> PerceptualHashes:
    return PerceptualHashes(hashes, np.full((len(hashes), 32), 128, np.uint8))


def flip_bits(value: np.uint64, *bits: int) -> np.uint64:
    for bit in bits:
        value ^= np.uint64(1) << np.uint64(bit)
    return value


def pairs_of(found: near_duplicates.Pairs) -> dict[tuple[int, int], int]:
    return {
        (int(a), int(b)): int(d) for a, b, d in zip(found.first, found.second, found.distance, strict=True)
    }


@pytest.mark.parametrize("change", COPIES)
def test_find_near_duplicates_modified_copies_are_found(photographs, change):
    hashes = {name: hash_of(image) for name, image in photographs.items()}
    hashes |= {f"{name} {change}": hash_of(COPIES[change](image)) for name, image in photographs.items()}
    found = find_near_duplicates(frame_of(hashes))
    assert {group.paths for group in found.near_duplicates} == {(name, f"{name} {change}") for name in NAMES}
    assert (found.same, found.featureless, found.complete) == ((), 0, True)


def test_find_near_duplicates_identical_files_are_reported_separately():
    first, second, other = "c2924c5532bddfc8", "c2924c5532bddfc1", "3d6db3aacd422037"
    frame = frame_of(
        {"b.png": first, "a.png": first, "near.png": second, "other.png": other, "dropped.png": first},
        keys={"a.png": "1", "b.png": "1"},
    )
    frame.loc[4, "status"] = "dropped"
    found = find_near_duplicates(frame)
    assert found.same == (("a.png", "b.png"),)
    assert [(group.paths, group.distance) for group in found.near_duplicates] == [(("a.png", "near.png"), 2)]


def test_find_near_duplicates_different_colours_are_distinct():
    def draw(colour: str) -> Image.Image:
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse((20, 30, 80, 100), fill=colour)
        return image

    hashes = {
        "red": hash_of(draw("red")),
        "again": hash_of(recompressed(draw("red"), 60)),
        "blue": hash_of(draw("blue")),
    }
    assert hashes["red"][:16] == hashes["blue"][:16]
    assert [group.paths for group in find_near_duplicates(frame_of(hashes)).near_duplicates] == [
        ("again", "red")
    ]


def test_find_near_duplicates_groups_are_connected_components():
    rare, common = random_hashes(2)
    chain = [
        common,
        flip_bits(common, *range(6)),
        flip_bits(common, *range(12)),
        flip_bits(common, *range(16)),
    ]
    hashes = {f"c{number}": f"{value:016x}" for number, value in enumerate(chain)}
    hashes |= {"r0": f"{rare:016x}", "r1": f"{rare:016x}"}
    found = find_near_duplicates(frame_of(hashes))
    assert [(group.paths, group.distance) for group in found.near_duplicates] == [
        (("c0", "c1", "c2", "c3"), 6),
        (("r0", "r1"), 0),
    ]


def test_find_near_duplicates_featureless_images_are_counted():
    flat = {f"{colour}.png": hash_of(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")}
    shaded = {"shaded.png": hash_of(Image.linear_gradient("L"))}
    found = find_near_duplicates(frame_of(flat | shaded | {"not hashed.png": ""}))
    assert (found.near_duplicates, found.featureless) == ((), 3)
    assert find_near_duplicates(frame_of({})) == near_duplicates.NearDuplicates((), (), 0, True)


@pytest.mark.parametrize("others", [False, True], ids=["within", "between"])
def test_near_pairs_band_search_equals_exhaustive_search(monkeypatch, others):
    hashes = random_hashes(3000)
    random = np.random.default_rng(1)
    near_copies = np.array(
        [
            flip_bits(value, *random.choice(64, index % 11, replace=False))
            for index, value in enumerate(hashes[:600])
        ]
    )
    hashes = np.concatenate([hashes, near_copies])
    arguments = (grey_hashes(hashes[:2000]), grey_hashes(hashes[1000:])) if others else (grey_hashes(hashes),)
    all_pairs = pairs_of(near_pairs(*arguments))
    monkeypatch.setattr(near_duplicates, "_MAX_ALL_PAIRS", 0)
    monkeypatch.setattr(near_duplicates, "_CANDIDATES_PER_CHUNK", 1000)
    assert pairs_of(near_pairs(*arguments)) == all_pairs
    first, second = (0, 3000 - 1000) if others else (0, 3000)
    for index in range(600):
        assert ((index + first, index + second) in all_pairs) == (index % 11 <= 8), index


def test_near_pairs_limits_end_the_search(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 500)
    frame_hashes = np.unique([flip_bits(random_hashes(1)[0], a, b) for a in range(30) for b in range(30, 60)])
    for max_all_pairs in (1 << 26, 0):
        monkeypatch.setattr(near_duplicates, "_MAX_ALL_PAIRS", max_all_pairs)
        found = near_pairs(grey_hashes(frame_hashes))
        assert (len(found.first), found.complete) == (500, False)
        assert found.distance.max() <= near_duplicates.MAX_DISTANCE
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 10**6)
    assert near_pairs(grey_hashes(frame_hashes)).complete
    monkeypatch.setattr(near_duplicates, "MAX_CANDIDATES", 10)
    assert not near_pairs(grey_hashes(frame_hashes)).complete


def test_find_near_duplicates_many_equal_hashes_are_one_group():
    value = f"{random_hashes(1)[0]:016x}"
    found = find_near_duplicates(frame_of({f"{number:06d}": value for number in range(20_000)}))
    assert [len(group.paths) for group in found.near_duplicates] == [20_000]
    assert found.complete


def test_find_leaks_gives_most_similar_training_image():
    value, other = random_hashes(2)
    train = frame_of(
        {
            "far": f"{flip_bits(value, 1, 2, 3, 4):016x}",
            "near": f"{flip_bits(value, 5, 6):016x}",
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
