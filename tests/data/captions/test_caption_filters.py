"""Tests of caption filter lists: removal, replacement, and errors."""

import json
import time

import pytest

from sdxl_pipeline.data.captions import caption_filters
from sdxl_pipeline.data.captions.caption_filters import filter_digest, load_caption_filter
from sdxl_pipeline.data.captions.text_files import CaptionError


@pytest.fixture
def filtered(make_dataset):
    def apply(caption: str, *lines: str) -> str:
        return load_caption_filter(make_dataset(caption_filter_list=list(lines))).apply(caption)

    return apply


@pytest.mark.parametrize(
    ("line", "caption", "expected"),
    [
        ("arafed", "arafed man in an arafed hat", "man in an hat"),
        ("The image shows ", "The image shows a fox", "a fox"),
        ("this .* has a", "look, this red fox has a tail", "look, tail"),
        ("^there is", "there is a fox where there is snow", "a fox where there is snow"),
        ("e.g.", "fox, e.g. red, eggs", "fox, red, eggs"),  # a full stop alone does not make an expression
        ("(blurry)", "a (blurry) fox", "a fox"),  # its own text is removed first
        ("(smile", "a (smile) fox", "a ) fox"),  # not a valid expression
        ("(?i)^an? photo of", "A photo of a fox", "a fox"),
        ("[0-9]+ ?px", "a fox, 300 px wide", "a fox, wide"),
        ("Füchse", "zwei Füchse", "zwei"),
        ("s/fox/wolf/", "a fox and a fox", "a wolf and a fox"),
        ("s/fox/wolf", "a fox", "a wolf"),
        ("s/fox/wolf/g", "a fox and a fox", "a wolf and a wolf"),
        ("s/FOX/wolf/gi", "a fox and a Fox", "a wolf and a wolf"),
        (r"s/(\w+) and (\w+)/\2 or \1/", "cats and dogs", "dogs or cats"),
        (r"s/w\/o/without/", "a fox w/o snow", "a fox without snow"),
        (r"s/\/\///", "a // fox", "a fox"),
    ],
)
def test_caption_filter_line_removes_or_replaces(filtered, line, caption, expected):
    assert filtered(caption, line) == expected


def test_caption_filter_lines_apply_in_order(filtered):
    assert filtered("arafed fox", "arafed", "s/fox/wolf/", "^wolf") == ""
    assert filtered("two  blanks ", "fox") == "two  blanks "
    assert filtered("first\narafed  second", "arafed") == "first\n second"


def test_caption_filter_file_preserves_blanks_of_lines(make_dataset, tmp_path):
    text_path, json_path = tmp_path / "filters.txt", tmp_path / "filters.json"
    text_path.write_bytes("arafed \r\n\r\n^there is\r\n".encode("utf-8-sig"))
    json_path.write_text(json.dumps(["arafed ", "^there is"]))
    for path in (text_path, json_path):
        caption_filter = load_caption_filter(make_dataset(caption_filter_list=str(path)))
        assert [rule.line for rule in caption_filter.rules] == ["arafed ", "^there is"]
        assert caption_filter.apply("there is an arafed fox") == "an fox"
    assert filter_digest(text_path) == filter_digest(json_path) == filter_digest(("arafed ", "^there is"))
    text_path.write_text("arafed\n")
    assert filter_digest(text_path) != filter_digest(json_path)
    assert load_caption_filter(make_dataset()) is None


def test_caption_filter_invalid_expressions_are_literal(make_dataset):
    caption_filter = load_caption_filter(make_dataset(caption_filter_list=["(smile", "plain", ":)", "[a-z"]))
    assert caption_filter.literal_lines == ("(smile", ":)", "[a-z")
    assert caption_filter.apply("x :) y (smile z [a-z") == "x y z"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s/(fox/wolf/", r"'s/\(fox/wolf/' is not a valid regular expression: missing \)"),
        ("s/fox/\\2/", "invalid group reference"),
        ("s//wolf/", "is not a valid replacement"),
        ("s/a/b/c/d", r"is not a valid replacement\. Write s/find/replace/, with \\/ for a slash"),
    ],
)
def test_caption_filter_invalid_replacement_raises(make_dataset, line, message):
    with pytest.raises(CaptionError, match=message) as raised:
        load_caption_filter(make_dataset(caption_filter_list=[line]))
    assert "dataset 'photos' in multidatabackend.json: caption_filter_list" in str(raised.value)


def test_caption_filter_unreadable_list_raises(make_dataset, tmp_path):
    files = {"gone.txt": None, "odd.txt": b"caf\xe9", "no.json": b"[", "object.json": b'{"a": 1}'}
    messages = [
        "cannot be read: No such file",
        "neither UTF-8",
        "is not valid JSON",
        "is not a list of strings",
    ]
    for (name, data), message in zip(files.items(), messages, strict=True):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CaptionError, match=message):
            load_caption_filter(make_dataset(caption_filter_list=str(tmp_path / name)))
        assert filter_digest(tmp_path / name) == ""


def test_caption_filter_slow_expression_raises_after_timeout(make_dataset, monkeypatch):
    monkeypatch.setattr(caption_filters, "SECONDS_PER_CAPTION", 0.1)
    caption_filter = load_caption_filter(make_dataset(caption_filter_list=["(a|aa)+$"]))
    started = time.monotonic()
    with pytest.raises(CaptionError, match=r"takes more than 0\.1 seconds on the caption 'aaaa"):
        caption_filter.apply("a" * 60 + "!")
    assert time.monotonic() - started < 30
