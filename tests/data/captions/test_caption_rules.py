"""Tests of caption strategies, text encodings, and the status of missing captions."""

import codecs

import pytest

from sdxl_pipeline.config.schema.datasets import TextEmbedsDataset
from sdxl_pipeline.data.captions.caption_rules import (
    Captions,
    caption_rules,
    captions_in,
    complete_caption_settings,
)
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.scan.image_reader import MAX_TEXT_BYTES, read_text
from tests.support.photographs import encoded

TEXTFILE = {"caption_strategy": "textfile"}


@pytest.fixture
def caption(make_dataset, folder, photograph):
    """Return a function of a caption file's bytes, or None for no file, that gives status, captions and reason of a scan."""
    (folder / "a.png").write_bytes(encoded(photograph, "PNG"))

    def scan(data: bytes | None, **settings):
        (folder / "a.txt").unlink(missing_ok=True)
        if data is not None:
            (folder / "a.txt").write_bytes(data)
        row = scan_dataset(make_dataset(**TEXTFILE, **settings), folder).iloc[0]
        return row["caption_status"], row["captions"], row["reason"]

    return scan


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("a_red_circle.png", "a red circle"),
        ("deep/er/Two__words-and.dots.v2_.jpeg", "Two  words-and.dots.v2 "),
        ("emoji_🦊_fox.webp", "emoji 🦊 fox"),
    ],
)
def test_caption_rules_filename_replaces_underscores_only(make_dataset, image, caption):
    assert caption_rules(make_dataset()).captions_for(image) == Captions((caption,), "ok")


@pytest.mark.parametrize(
    "data",
    [
        b"first caption\nsecond caption\n",
        b"first caption\r\nsecond caption\r\n",
        b"first caption\rsecond caption",
        b"\n  first caption  \n\n\t\nsecond caption",
        b"first caption\nsecond caption\nfirst caption",
        codecs.BOM_UTF8 + b"first caption\nsecond caption",
        "first caption\r\nsecond caption".encode("utf-16"),
        codecs.BOM_UTF16_BE + "first caption\nsecond caption".encode("utf-16-be"),
    ],
)
def test_caption_rules_text_file_lines_are_captions(caption, data):
    assert caption(data) == ("ok", ["first caption", "second caption"], "")


def test_caption_rules_disable_multiline_split_gives_one_caption(caption):
    text = b"\xef\xbb\xbf first line\r\n\r\nlast line \r\n"
    assert caption(text, disable_multiline_split=True) == ("ok", ["first line\n\nlast line"], "")


def test_caption_rules_unicode_separators_do_not_split_lines(caption):
    assert caption("café\u2028次\x0cend 🦊".encode())[1] == ["café\u2028次\x0cend 🦊"]


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
        (
            codecs.BOM_UTF16_LE + b"odd",
            "undecodable",
            "caption file is neither UTF-8 nor UTF-16 with a byte order mark",
        ),
        (b"x" * (MAX_TEXT_BYTES + 1), "too large", "caption file is larger than 1 MB"),
    ],
)
def test_caption_rules_unusable_caption_is_dropped_or_empty(caption, data, status, reason):
    assert caption(data) == (status, [], reason)
    assert caption(data, missing_captions="empty") == (status, [""], "")


def test_read_text_unreadable_file_differs_from_missing_file(make_dataset, folder):
    (folder / "a.txt").mkdir()
    assert read_text(str(folder / "a.txt")).text_status == "unreadable"
    rules = caption_rules(make_dataset(**TEXTFILE))
    assert rules.drop_reason(rules.captions_for("a.png", (), "unreadable")) == "caption file cannot be read"


def test_caption_rules_instance_prompt_prepends_or_replaces(make_dataset):
    prompt = TEXTFILE | {"instance_prompt": "a sks fox"}

    def texts(*read: str, **settings):
        return caption_rules(make_dataset(**(prompt | settings))).captions_for("a.png", read).texts

    assert texts("one", "two") == ("one", "two")
    assert texts("one", "two", prepend_instance_prompt=True) == ("a sks fox one", "a sks fox two")
    assert texts("one", "two", only_instance_prompt=True) == ("a sks fox",)
    # no caption is missing if none is read
    replaced = caption_rules(make_dataset(**prompt, only_instance_prompt=True))
    assert replaced.captions_for("a.png", (), "missing") == Captions(("a sks fox",), "ok")
    assert texts(caption_strategy="instanceprompt", prepend_instance_prompt=True) == ("a sks fox",)


def test_caption_rules_prefix_keeps_missing_status(make_dataset):
    settings = TEXTFILE | {"instance_prompt": "a sks fox", "prepend_instance_prompt": True}
    dropped = caption_rules(make_dataset(**settings)).captions_for("a.png", (), "missing")
    assert dropped == Captions((), "missing")
    emptied = caption_rules(make_dataset(**settings, missing_captions="empty"))
    assert emptied.captions_for("a.png", (), "missing") == Captions(("a sks fox",), "missing")


def test_caption_rules_filter_shuffle_and_prefix_apply_in_order(make_dataset):
    rules = caption_rules(
        make_dataset(
            **TEXTFILE,
            caption_filter_list=["^photo of ", "junk"],
            caption_shuffle={"enable": True, "count": 1, "seed": 1},
            instance_prompt="sks",
            prepend_instance_prompt=True,
        )
    )
    first, second = rules.captions_for("a.png", ["photo of fox, snow", "junk"]).texts
    assert (first, second) == ("sks fox, snow", "sks snow, fox")
    emptied = rules.captions_for("a.png", ["junk"])
    assert emptied == Captions((), "filtered")
    assert rules.drop_reason(emptied) == "caption is empty after the filter list"


def test_complete_caption_settings_own_settings_take_precedence(make_dataset):
    texts = TextEmbedsDataset(id="t", caption_filter_list=("default",))
    shuffled = {"caption_shuffle": {"enable": True}}
    completed = complete_caption_settings(make_dataset(**shuffled), texts, 7)
    assert (completed.caption_filter_list, completed.caption_shuffle.seed) == (("default",), 7)
    own = make_dataset(caption_filter_list=["own"], caption_shuffle={"enable": True, "seed": 3})
    assert complete_caption_settings(own, texts, 7) == own


def test_captions_in_text_preserves_order():
    assert [text for text in captions_in("b\n\n a ", one=False) if text] == ["b", "a"]
