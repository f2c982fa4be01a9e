"""Tests of the classification of files: images, their caption files, and reasons for skipped files."""

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.scan.file_listing import classify_files, split_suffix
from tests.support.photographs import encoded

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def classify(*paths: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the caption file of each image, and the reason of each skipped file."""
    ordered = sorted(paths)
    file_types = classify_files(ordered, [""] * len(ordered))
    found = {ordered[image]: ordered[text] for image, text in file_types.caption_files.items()}
    assert len(ordered) == len(file_types.images) + len(file_types.sidecars) + len(file_types.skipped)
    return found, {ordered[position]: reason for position, reason in file_types.skipped.items()}


def test_classify_files_unicode_normal_forms_match():
    assert classify(f"{COMPOSED}.png", f"{DECOMPOSED}.txt") == ({f"{COMPOSED}.png": f"{DECOMPOSED}.txt"}, {})
    assert classify(f"{DECOMPOSED}.png", f"{COMPOSED}.txt") == ({f"{DECOMPOSED}.png": f"{COMPOSED}.txt"}, {})
    both = classify(*(f"{stem}.{suffix}" for stem in (COMPOSED, DECOMPOSED) for suffix in ("png", "txt")))
    assert both == (
        {f"{stem}.png": f"{stem}.txt" for stem in (COMPOSED, DECOMPOSED)},
        {},
    )  # an exact match takes precedence


def test_classify_files_case_of_stem_matters():
    found, skipped = classify("A.JPG", "a.jpg", "a.TXT", "B.png", "b.txt", "c.txt")
    assert found == {"a.jpg": "a.TXT"}
    assert skipped == {
        "b.txt": "caption without image; an image's name differs in case only",
        "c.txt": "caption without image",
    }


def test_classify_files_txt_takes_precedence_over_caption():
    found, skipped = classify(
        "a.png", "a.caption", "b.png", "b.caption", "b.txt", "c.png", "c.TXT", "c.txt", "d.CAPTION"
    )
    assert found == {"a.png": "a.caption", "b.png": "b.txt", "c.png": "c.txt"}
    assert skipped == {
        "b.caption": "caption file is not read beside one with the extension .txt",
        "c.TXT": "caption file is not read beside one with the extension .txt",
        "d.CAPTION": "caption without image",
    }


def test_classify_files_caption_of_skipped_image_is_sidecar():
    assert classify("a.psd", "a.txt", "b.txt") == (
        {},
        {"a.psd": "image format .psd is not supported", "b.txt": "caption without image"},
    )
    assert classify("a.png", "a.jpg", "a.txt")[0] == {"a.png": "a.txt", "a.jpg": "a.txt"}
    assert classify("x/a.png", "y/a.txt") == ({}, {"y/a.txt": "caption without image"})


def test_split_suffix_uses_last_dot_of_name():
    names = {
        "a.b/c": ("a.b/c", ""),
        "a/.png": ("a/.png", ""),
        "a/b.tar.GZ": ("a/b.tar", ".gz"),
        "a.": ("a", "."),
    }
    assert {name: split_suffix(name) for name in names} == names


def test_scan_dataset_reads_caption_files_of_both_extensions(make_dataset, folder, photograph):
    for number, suffix in enumerate(("txt", "caption")):
        (folder / f"{number}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
        (folder / f"{number}.{suffix}").write_text(f"caption {number}")
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    assert scanned["captions"].tolist() == [["caption 0"], ["caption 1"]]


def test_scan_dataset_unusual_names_are_read(make_dataset, folder, photograph):
    stems = [
        "with space",
        "two\nlines",
        "emoji 🦊",
        "עברית",
        "x" * 251,
        "é" * 125,
        "a",
        "A",
        "-rf",
        "50%",
        "'q\"",
        "a.b.c",
        "#",
    ]
    for number, stem in enumerate(stems):
        (folder / f"{stem}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
        (folder / f"{stem}.txt").write_text(f"caption {number}")
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    assert dict(zip(scanned["path"], scanned["captions"], strict=True)) == {
        f"{stem}.png": [f"caption {number}"] for number, stem in enumerate(stems)
    }
    assert (scanned["status"] == "kept").all()
