"""What a filter list takes out of captions, what it leaves, and what it refuses by name."""

import json
import time

import pytest

from sdxl_pipeline.data.captions import caption_filters
from sdxl_pipeline.data.captions.caption_filters import caption_filter_of, filter_digest
from sdxl_pipeline.data.captions.text_files import CaptionError


@pytest.fixture
def filtered(make_dataset):
    def apply(caption: str, *lines: str) -> str:
        return caption_filter_of(make_dataset(caption_filter_list=list(lines))).apply(caption)

    return apply


@pytest.mark.parametrize(
    ("line", "caption", "left"),
    [
        ("arafed", "arafed man in an arafed hat", "man in an hat"),
        ("The image shows ", "The image shows a fox", "a fox"),
        ("this .* has a", "look, this red fox has a tail", "look, tail"),
        ("^there is", "there is a fox where there is snow", "a fox where there is snow"),
        ("e.g.", "fox, e.g. red, eggs", "fox, red, eggs"),  # a full stop alone makes no expression
        ("(blurry)", "a (blurry) fox", "a fox"),  # its own text goes first
        ("(smile", "a (smile) fox", "a ) fox"),  # no expression at all
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
def test_a_line_does_what_it_says(filtered, line, caption, left):
    assert filtered(caption, line) == left


def test_lines_are_applied_in_turn_and_what_they_leave_alone_is_unchanged(filtered):
    assert filtered("arafed fox", "arafed", "s/fox/wolf/", "^wolf") == ""
    assert filtered("two  blanks ", "fox") == "two  blanks "
    assert filtered("first\narafed  second", "arafed") == "first\n second"


def test_a_file_of_lines_keeps_their_blanks(make_dataset, tmp_path):
    text, listed = tmp_path / "filters.txt", tmp_path / "filters.json"
    text.write_bytes("arafed \r\n\r\n^there is\r\n".encode("utf-8-sig"))
    listed.write_text(json.dumps(["arafed ", "^there is"]))
    for path in (text, listed):
        found = caption_filter_of(make_dataset(caption_filter_list=str(path)))
        assert [rule.line for rule in found.rules] == ["arafed ", "^there is"]
        assert found.apply("there is an arafed fox") == "an fox"
    assert filter_digest(text) == filter_digest(listed) == filter_digest(("arafed ", "^there is"))
    text.write_text("arafed\n")
    assert filter_digest(text) != filter_digest(listed)
    assert caption_filter_of(make_dataset()) is None


def test_lines_that_are_no_expression_are_taken_literally_and_named(make_dataset):
    found = caption_filter_of(make_dataset(caption_filter_list=["(smile", "plain", ":)", "[a-z"]))
    assert found.taken_literally == ("(smile", ":)", "[a-z")
    assert found.apply("x :) y (smile z [a-z") == "x y z"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("s/(fox/wolf/", r"'s/\(fox/wolf/' is no regular expression: missing \)"),
        ("s/fox/\\2/", "invalid group reference"),
        ("s//wolf/", "is no replacement"),
        ("s/a/b/c/d", r"is no replacement\. Write s/find/replace/, with \\/ for a slash"),
    ],
)
def test_a_replacement_that_cannot_be_meant_is_refused_by_name(make_dataset, line, message):
    with pytest.raises(CaptionError, match=message) as raised:
        caption_filter_of(make_dataset(caption_filter_list=[line]))
    assert "dataset 'photos' in multidatabackend.json: caption_filter_list" in str(raised.value)


def test_a_list_that_cannot_be_read_is_refused_by_name(make_dataset, tmp_path):
    files = {"gone.txt": None, "odd.txt": b"caf\xe9", "no.json": b"[", "object.json": b'{"a": 1}'}
    told = ["cannot be read: No such file", "neither UTF-8", "is no JSON", "holds no list of texts"]
    for (name, data), message in zip(files.items(), told, strict=True):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CaptionError, match=message):
            caption_filter_of(make_dataset(caption_filter_list=str(tmp_path / name)))
        assert filter_digest(tmp_path / name) == ""


def test_an_expression_without_end_is_stopped_and_named(make_dataset, monkeypatch):
    monkeypatch.setattr(caption_filters, "SECONDS_PER_CAPTION", 0.1)
    found = caption_filter_of(make_dataset(caption_filter_list=["(a|aa)+$"]))
    began = time.monotonic()
    with pytest.raises(CaptionError, match=r"takes more than 0\.1 seconds on the caption 'aaaa"):
        found.apply("a" * 60 + "!")
    assert time.monotonic() - began < 30
