"""Tests of frame digests: they depend on images, captions and geometry, but not on names and order."""

import hashlib
import struct

import pandas as pd
import pytest

from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.scan.dataset_fingerprint import dataset_digest, rows_digest

IMAGES = [
    ("a.png", "aa", 300, 400, ["a cat", "the cat"]),
    ("b.png", "bb", 500, 400, ["a dog, é"]),
    ("c.png", "cc", 500, 400, []),
    ("copy of a.png", "aa", 300, 400, ["a cat on a mat"]),
]


def scan_of(images=IMAGES, **changes) -> pd.DataFrame:
    rows = [
        {"path": path, "key": key, "height": height, "width": width, "captions": captions, "mtime_ns": 1}
        for path, key, height, width, captions in images
    ]
    return pd.DataFrame(rows).assign(status="kept", **changes)


def test_dataset_digest_matches_documented_canonical_form():
    def integers(*values: int) -> bytes:
        return struct.pack(f"<{len(values)}q", *values)

    texts = [b"a cat\nthe cat\n", b"a cat on a mat\n", "a dog, é\n".encode(), b""]
    canonical_form = b"key\0" + integers(2, 2, 2, 2) + b"aaaabbcc"
    canonical_form += b"height\0" + integers(300, 300, 500, 500)
    canonical_form += b"width\0" + integers(400, 400, 400, 400)
    canonical_form += b"captions\0" + integers(*map(len, texts)) + b"".join(texts)
    assert dataset_digest(scan_of()) == hashlib.sha256(canonical_form).hexdigest()


def test_dataset_digest_ignores_names_times_order_and_dropped_rows(tmp_path):
    digest = dataset_digest(scan_of())
    renamed = scan_of(path=["z.png", "sub/b.png", "a.png", "c.png"], mtime_ns=2, size=7)
    assert dataset_digest(renamed) == digest
    assert dataset_digest(renamed.iloc[[2, 0, 3, 1]]) == digest
    stray = scan_of([("notes.txt", "dd", 0, 0, [])]).assign(status="dropped")
    assert dataset_digest(pd.concat([stray, scan_of()])) == digest
    scan_of().to_parquet(tmp_path / "scan.parquet")  # Parquet returns arrays instead of lists
    assert dataset_digest(pd.read_parquet(tmp_path / "scan.parquet")) == digest


@pytest.mark.parametrize(
    "change",
    [
        ("a.png", "ab", 300, 400, ["a cat", "the cat"]),
        ("a.png", "aa", 301, 400, ["a cat", "the cat"]),
        ("a.png", "aa", 300, 401, ["a cat", "the cat"]),
        ("a.png", "aa", 300, 400, ["a cat", "the Cat"]),
        ("a.png", "aa", 300, 400, ["the cat", "a cat"]),
        ("a.png", "aa", 300, 400, ["a cat\nthe cat"]),
        ("a.png", "aa", 300, 400, ["a cat\\nthe cat"]),
        ("a.png", "aa", 300, 400, ["a cat", "the cat", ""]),
        ("a.png", "aa", 300, 400, ["a catthe cat"]),
        ("a.png", "aa", 300, 400, []),
        ("a.png", "aa", 300, 400, [""]),
    ],
)
def test_dataset_digest_changes_with_content_size_and_captions(change):
    digests = {dataset_digest(scan_of([image, *IMAGES[1:]])) for image in (IMAGES[0], change)}
    assert len(digests) == 2


def test_dataset_digest_distinguishes_line_breaks():
    captions = [["a\nb"], ["a", "b"], ["a\\nb"], ["a\\", "nb"], ["a", "", "b"], ["a\n", "b"], [], [""]]
    digests = {dataset_digest(scan_of([("a.png", "aa", 3, 4, texts)])) for texts in captions}
    assert len(digests) == len(captions)


def test_dataset_digest_counts_duplicate_rows():
    assert dataset_digest(scan_of([IMAGES[0]] * 2)) != dataset_digest(scan_of(IMAGES[:1]))
    assert dataset_digest(scan_of().iloc[:0]) == dataset_digest(scan_of().assign(status="dropped"))


def test_rows_digest_ignores_only_paths_and_order(make_dataset, tmp_path):
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(9)]
    scanned = scan_of([(f"{n}.png", key, 300 + n, 700, []) for n, key in enumerate(keys)])
    dataset = make_dataset(crop=True, crops_per_image=2, random_flip=True)
    rows, _ = plan_crops(dataset, scanned, 0, keys[:3], is_eval=False)
    digest = rows_digest(rows)
    assert rows_digest(rows.iloc[::-1].assign(path="elsewhere.png")) == digest
    rows.to_parquet(tmp_path / "rows.parquet")
    assert rows_digest(pd.read_parquet(tmp_path / "rows.parquet")) == digest
    for column in rows.columns.drop("path"):
        changed = rows.copy()
        value = changed.loc[3, column]
        new_value = {"key": "ff", "split": "other", "flipped": not value}.get(column, 100_000)
        changed.loc[3, column] = new_value
        assert rows_digest(changed) != digest, column
    assert rows_digest(rows.iloc[:0]) != digest
