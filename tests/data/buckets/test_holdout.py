"""Tests of the held-out split: minimum size, no release of held-out images, near duplicates in one split."""

import hashlib
import random

import pandas as pd
import pytest

from sdxl_pipeline.data.buckets.holdout import HoldoutRecord, choose_held_out, hold_out


def images(names, group=lambda name: name) -> pd.DataFrame:
    """Return a scan of images by name; images of one group have equal perceptual hashes."""
    rows = [
        {
            "path": f"{name}.png",
            "key": hashlib.sha256(str(name).encode()).hexdigest(),
            "phash": hashlib.blake2b(repr(group(name)).encode(), digest_size=40).hexdigest(),
            "status": "kept",
        }
        for name in names
    ]
    return pd.DataFrame(rows, columns=["path", "key", "phash", "status"], dtype="str")


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(0, 0, 0), (7, 0, 0), (8, 1, 4), (10, 1, 5), (19, 1, 9), (20, 2, 10), (30, 2, 15)],
)
def test_choose_held_out_small_dataset_reaches_minimum(count, least, most):
    for seed in range(60):
        held_out = choose_held_out(images([(seed, number) for number in range(count)]), 0.1, ())
        assert least <= len(held_out) <= most


def test_choose_held_out_large_dataset_matches_golden_selection():
    scan = images(range(4000))
    tenth, fifth = (choose_held_out(scan, share, ()) for share in (0.1, 0.2))
    assert 320 < len(tenth) < 480  # four standard deviations of 19
    assert tenth < fifth
    # golden values, so that no later version changes the split of a user's images
    assert [n for n, key in enumerate(scan["key"][:60]) if key in tenth] == [
        2,
        4,
        6,
        8,
        13,
        17,
        34,
        37,
        39,
        54,
    ]


@pytest.mark.parametrize("seed", range(25))
def test_hold_out_changing_dataset_never_releases_held_out_images(tmp_path, seed):
    generator = random.Random(seed)
    sizes = generator.choice([1, 3, 10])
    present: set[int] = set()
    previous: frozenset[str] = frozenset()
    removed: set[str] = set()
    for number in range(30):
        present |= {number * 10 + extra for extra in range(generator.randint(0, 6))}
        if generator.random() < 0.3:
            present -= set(generator.sample(sorted(present), k=len(present) // 3))
        names = generator.sample(sorted(present), k=len(present))
        scan = images(names, group=lambda name: (seed, name % (7 * sizes) if sizes > 1 else name))
        keys = set(scan["key"])
        held_out = hold_out(scan, 0.1, tmp_path / "held_out.json")
        assert held_out <= keys
        assert previous & keys <= held_out, "a held-out image was moved into training"
        assert removed & keys <= held_out, "a restored image that was held out is held out again"
        least = 2 if len(keys) >= 20 else 1 if len(keys) >= 8 else 0
        assert len(held_out) >= least
        removed |= held_out - keys
        previous = held_out
        removed |= set(held_out)


@pytest.mark.parametrize("seed", range(20))
def test_choose_held_out_near_duplicates_are_in_one_split(seed):
    def group(name):
        return (seed, name[0])

    scan = images([(group, number) for group in range(12) for number in range(3)], group)
    held_out = choose_held_out(scan, 0.2, ())
    sides = scan.assign(held_out=scan["key"].isin(held_out), group=scan.index // 3).groupby("group")[
        "held_out"
    ]
    assert (sides.nunique() == 1).all()
    assert 2 <= len(held_out) <= 18
    # an image that joins a held-out group is held out with it
    held_any_length = int(sides.first().idxmax())
    joined = images([(g, n) for g in range(12) for n in range(4)], group)
    again = choose_held_out(joined, 0.2, held_out)
    assert held_out <= again
    assert joined["key"][held_any_length * 4 + 3] in again


def test_choose_held_out_single_group_is_split_to_reach_minimum():
    assert len(choose_held_out(images(range(25), group=lambda name: 0), 0.1, ())) == 2


def test_choose_held_out_group_far_above_share_is_skipped():
    for seed in range(40):
        scan = images(
            range(10), group=lambda name, seed=seed: (seed, max(name, 3))
        )  # three and a group of seven
        assert len(choose_held_out(scan, 0.1, ())) <= 3


def test_choose_held_out_copies_count_once():
    scan = pd.concat([images(range(7))] * 4, ignore_index=True).assign(path=[f"{n}.png" for n in range(28)])
    assert choose_held_out(scan, 0.1, ()) == frozenset()


def test_hold_out_lower_share_restarts_record(tmp_path):
    scan, record = images(range(200)), tmp_path / "held_out.json"
    half = hold_out(scan, 0.5, record)
    assert hold_out(scan, 0.5, record) == half
    tenth = hold_out(scan, 0.1, record)
    assert tenth == choose_held_out(scan, 0.1, ())
    assert tenth < half
    assert set(HoldoutRecord.model_validate_json(record.read_bytes()).keys) == tenth
    assert hold_out(scan, 0.0, record) == frozenset()
    assert not record.exists()
