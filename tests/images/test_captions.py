"""Every caption strategy word for word, text files as editors write them, and a missing caption by its name."""

import codecs

import pytest

from sdxl_pipeline.images.captions import Captions, captions_of

TEXTFILE = {"caption_strategy": "textfile"}


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("a_red_circle.png", "a red circle"),
        ("deep/er/Two__words-and.dots.v2_.jpeg", "Two  words-and.dots.v2 "),
        ("emoji_🦊_fox.webp", "emoji 🦊 fox"),
    ],
)
def test_filename_changes_underscores_and_nothing_else(make_dataset, picture, caption):
    assert captions_of(make_dataset(), picture, None) == Captions((caption,), "ok")


@pytest.mark.parametrize(
    "data",
    [
        b"first caption\nsecond caption\n",
        b"first caption\r\nsecond caption\r\n",
        b"first caption\rsecond caption",
        b"\n  first caption  \n\n\t\nsecond caption",
        codecs.BOM_UTF8 + b"first caption\nsecond caption",
        "first caption\r\nsecond caption".encode("utf-16"),
        codecs.BOM_UTF16_BE + "first caption\nsecond caption".encode("utf-16-be"),
    ],
)
def test_each_line_of_a_text_file_is_a_caption(make_dataset, folder, data):
    (folder / "a.txt").write_bytes(data)
    assert captions_of(make_dataset(**TEXTFILE), "a.png", folder / "a.txt") == Captions(
        ("first caption", "second caption"), "ok"
    )


def test_unusual_characters_stay_within_their_line(make_dataset, folder):
    (folder / "a.txt").write_text("café\u2028次\x0cend 🦊", encoding="utf-8")
    assert captions_of(make_dataset(**TEXTFILE), "a.png", folder / "a.txt").texts == (
        "café\u2028次\x0cend 🦊",
    )


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (None, "missing", "no caption file"),
        (b"", "empty", "caption is empty"),
        (b" \n\r\n", "empty", "caption is empty"),
        (
            "café".encode("latin-1"),
            "undecodable",
            "caption file is neither UTF-8 nor UTF-16 with a byte order mark",
        ),
        (
            "no mark".encode("utf-16-le"),
            "undecodable",
            "caption file is neither UTF-8 nor UTF-16 with a byte order mark",
        ),
    ],
)
def test_a_caption_that_is_not_to_be_had_is_named_or_emptied(make_dataset, folder, data, status, reason):
    path = None
    if data is not None:
        path = folder / "a.txt"
        path.write_bytes(data)
    dropped = captions_of(make_dataset(**TEXTFILE), "a.png", path)
    assert (dropped.texts, dropped.status, dropped.drop_reason) == ((), status, reason)
    emptied = captions_of(make_dataset(**TEXTFILE, missing_captions="empty"), "a.png", path)
    assert (emptied.texts, emptied.status, emptied.drop_reason) == (("",), status, "")


def test_a_caption_file_that_cannot_be_read_is_told_from_a_missing_one(make_dataset, folder):
    (folder / "a.txt").mkdir()
    found = captions_of(make_dataset(**TEXTFILE), "a.png", folder / "a.txt")
    assert (found.texts, found.drop_reason) == ((), "caption file cannot be read")


def test_the_instance_prompt_prefixes_or_replaces(make_dataset, folder):
    path = folder / "a.txt"
    path.write_text("one\ntwo\n")
    prompt = TEXTFILE | {"instance_prompt": "a sks fox"}
    assert captions_of(make_dataset(**prompt), "a.png", path).texts == ("one", "two")
    assert captions_of(make_dataset(**prompt, prepend_instance_prompt=True), "a.png", path).texts == (
        "a sks fox one",
        "a sks fox two",
    )
    assert captions_of(make_dataset(**prompt, only_instance_prompt=True), "a.png", path).texts == (
        "a sks fox",
    )
    # nothing is missing when nothing is read
    assert captions_of(make_dataset(**prompt, only_instance_prompt=True), "a.png", None) == Captions(
        ("a sks fox",), "ok"
    )
    everywhere = make_dataset(
        caption_strategy="instanceprompt", instance_prompt="a sks fox", prepend_instance_prompt=True
    )
    assert captions_of(everywhere, "a.png", None) == Captions(("a sks fox",), "ok")


def test_a_prefix_does_not_hide_that_the_caption_is_missing(make_dataset):
    settings = TEXTFILE | {"instance_prompt": "a sks fox", "prepend_instance_prompt": True}
    assert captions_of(make_dataset(**settings), "a.png", None) == Captions((), "missing")
    assert captions_of(make_dataset(**settings, missing_captions="empty"), "a.png", None) == Captions(
        ("a sks fox",), "missing"
    )
