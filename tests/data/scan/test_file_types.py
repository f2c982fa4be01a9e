"""Which caption file is which image's, and what every other file is called."""

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.scan.file_types import classify_files, split_suffix
from tests.support.photographs import encoded

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def captioned(*paths: str) -> tuple[dict[str, str], dict[str, str]]:
    """The caption file of each image, and the reason of each file that is left out."""
    ordered = sorted(paths)
    roles = classify_files(ordered, [""] * len(ordered))
    found = {ordered[image]: ordered[text] for image, text in roles.caption_files.items()}
    assert len(ordered) == len(roles.images) + len(roles.companions) + len(roles.left_out)
    return found, {ordered[position]: reason for position, reason in roles.left_out.items()}


def test_a_caption_file_is_found_whatever_the_normal_form_of_its_name():
    assert captioned(f"{COMPOSED}.png", f"{DECOMPOSED}.txt") == ({f"{COMPOSED}.png": f"{DECOMPOSED}.txt"}, {})
    assert captioned(f"{DECOMPOSED}.png", f"{COMPOSED}.txt") == ({f"{DECOMPOSED}.png": f"{COMPOSED}.txt"}, {})
    both = captioned(*(f"{stem}.{suffix}" for stem in (COMPOSED, DECOMPOSED) for suffix in ("png", "txt")))
    assert both == (
        {f"{stem}.png": f"{stem}.txt" for stem in (COMPOSED, DECOMPOSED)},
        {},
    )  # one that fits exactly goes first


def test_the_case_of_a_name_matters_and_that_of_its_extension_does_not():
    found, left_out = captioned("A.JPG", "a.jpg", "a.TXT", "B.png", "b.txt", "c.txt")
    assert found == {"a.jpg": "a.TXT"}
    assert left_out == {
        "b.txt": "caption without image; an image's name differs in case only",
        "c.txt": "caption without image",
    }


def test_kohyas_extension_is_a_caption_file_after_txt():
    found, left_out = captioned(
        "a.png", "a.caption", "b.png", "b.caption", "b.txt", "c.png", "c.TXT", "c.txt", "d.CAPTION"
    )
    assert found == {"a.png": "a.caption", "b.png": "b.txt", "c.png": "c.txt"}
    assert left_out == {
        "b.caption": "caption file is not read beside one with the extension .txt",
        "c.TXT": "caption file is not read beside one with the extension .txt",
        "d.CAPTION": "caption without image",
    }


def test_the_caption_of_an_image_that_is_left_out_is_left_with_it():
    assert captioned("a.psd", "a.txt", "b.txt") == (
        {},
        {"a.psd": "image format .psd is not supported", "b.txt": "caption without image"},
    )
    assert captioned("a.png", "a.jpg", "a.txt")[0] == {"a.png": "a.txt", "a.jpg": "a.txt"}
    assert captioned("x/a.png", "y/a.txt") == ({}, {"y/a.txt": "caption without image"})


def test_an_extension_is_what_stands_behind_the_last_full_stop_of_the_name():
    names = {
        "a.b/c": ("a.b/c", ""),
        "a/.png": ("a/.png", ""),
        "a/b.tar.GZ": ("a/b.tar", ".gz"),
        "a.": ("a", "."),
    }
    assert {name: split_suffix(name) for name in names} == names


def test_a_scan_reads_caption_files_of_both_extensions(make_dataset, folder, photograph):
    for number, suffix in enumerate(("txt", "caption")):
        (folder / f"{number}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))
        (folder / f"{number}.{suffix}").write_text(f"caption {number}")
    scanned = scan_dataset(make_dataset(caption_strategy="textfile"), folder)
    assert scanned["captions"].tolist() == [["caption 0"], ["caption 1"]]


def test_names_that_few_programs_bear_are_names_like_any_other(make_dataset, folder, photograph):
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
