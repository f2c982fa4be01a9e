"""Tests of table rows and cells: parsing, errors with line or type, and notes on unmatched rows."""

import pytest

from sdxl_pipeline.data.captions.table_rows import (
    TableError,
    cell_texts,
    csv_rows,
    json_rows,
    likely_cause,
    name_text,
    unmatched_notes,
)


@pytest.mark.parametrize(
    ("rows", "phrases"),
    [
        ("a.png,a man, a dog, a tree\n", ["line 2 has 4 fields, and the header has 2", "in double quotes"]),
        ("a.png,x\nb.png\n", ["line 3 has 1 field, and the header has 2", "it may be empty"]),
        ('a.png,"a man\nb.png,a dog\n', ["line 2", "unexpected end of data"]),
        ('a.png,"a man\nb.png,"a dog"\n', ["line 2", "expected after"]),
        ('a.png,"a man"s dog"\n', ["line 2", 'write "" for one']),
        ('a.png,"a man\nb.png,"\n', ["line 2", "seems to contain further rows"]),
        ('\na.png,x\n\nb.png,"1\n2"\nc.png\n', ["line 7 has 1 field"]),
    ],
)
def test_csv_rows_malformed_row_raises_with_line(rows, phrases):
    with pytest.raises(TableError) as caught:
        list(csv_rows("url,caption\n" + rows))
    assert all(word in str(caught.value) for word in phrases), caught.value


def test_csv_rows_duplicate_column_raises():
    with pytest.raises(TableError, match=r"line 1: the header has the column 'caption' twice"):
        list(csv_rows("url,caption,caption\n"))


def test_csv_rows_quotes_blank_lines_and_empty_cells_are_read():
    text = '\n url , caption\n\na.png,"a man, ""the"" dog\nand, a tree"\n   \n,nobody\nc.png,\n'
    assert list(csv_rows(text)) == [
        (4, {"url": "a.png", "caption": 'a man, "the" dog\nand, a tree'}),
        (7, {"url": "", "caption": "nobody"}),
        (8, {"url": "c.png", "caption": ""}),
    ]


def test_json_rows_have_line_numbers():
    assert list(json_rows('{"a": 1}\n\n{"a": 2}\n')) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(json_rows('[{"a": 1}, {"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]
    for text, phrases in (
        ("{}\n[1]", "line 2 is not a JSON object"),
        ("{}\n{", "line 2 is not valid JSON"),
        ("[", "not a valid JSON list"),
    ):
        with pytest.raises(TableError, match=phrases):
            list(json_rows(text))


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (" a cat ", ["a cat"]),
        ("Käse".encode(), ["Käse"]),
        (["a", b"b", None, " "], ["a", "b"]),
        (None, []),
        (float("nan"), []),
        ("", []),
    ],
)
def test_cell_texts_text_bytes_and_lists_are_captions(value, texts):
    assert cell_texts(value, "caption") == texts


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"short": "a cat"}, "objects (with the fields short)"),
        ([["a cat"]], "lists within lists"),
        ([{"short": "a"}], "objects"),
        (True, "true or false"),
        (7, "numbers (7)"),
        (0.5, "numbers (0.5)"),
        (b"\xff\xfe\xfa", "bytes that are not UTF-8 text"),
        (b"caf\xe9", "bytes that are not UTF-8 text"),
    ],
)
def test_cell_texts_other_types_raise_with_column_and_type(value, kind):
    with pytest.raises(TableError) as caught:
        cell_texts(value, "label")
    assert str(caught.value).startswith(f"column 'label' has {kind}")


def test_name_text_numbers_and_text_are_names():
    assert [name_text(value, "id") for value in (7, 7.0, 2.5, "a", b"b", None, float("nan"))] == [
        "7",
        "7",
        "2.5",
        "a",
        "b",
        "",
        "",
    ]
    for value in (True, {"path": "a"}, ["a"]):
        with pytest.raises(TableError, match="column 'id' has"):
            name_text(value, "id")


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("x\\1.png", "the paths have backslashes; write forward slashes"),
        ("train/x/1.png", "begin with 'train/'"),
        ("/data/train/0.png", "begin with '/data/train/'"),
        ("C:\\cats\\0.png", "backslashes; write forward slashes; the paths begin with 'C:/cats/'"),
        ("0.PNG", "upper and lower case"),
        ("X/1.png", "upper and lower case"),
        ("9.png", ""),
    ],
)
def test_likely_cause_unmatched_name_gives_hint(name, phrases):
    known = {"0.png", "x/1.png"}
    cause = likely_cause(name, known.__contains__, known)
    assert phrases in cause
    assert bool(cause) == bool(phrases)


def test_unmatched_notes_group_rows_by_cause():
    names = {f"train/{number}": 2 for number in range(5)} | {"x": 1}
    causes = unmatched_notes("t.csv", names, lambda name: "the folder" if "/" in name else "")
    assert list(causes) == [
        "10 rows of t.csv without a matching image, such as 'train/0', 'train/1', 'train/2', ...: the folder.",
        "1 row of t.csv without a matching image, such as 'x'.",
    ]
