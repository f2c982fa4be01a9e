"""Tables are read in full or refused with the line; cells are text or refused with their type; causes of unmatched rows."""

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
    ("rows", "words"),
    [
        ("a.png,a man, a dog, a tree\n", ["line 2 has 4 fields, and the header has 2", "in double quotes"]),
        ("a.png,x\nb.png\n", ["line 3 has 1 field, and the header has 2", "it may be empty"]),
        ('a.png,"a man\nb.png,a dog\n', ["line 2", "unexpected end of data"]),
        ('a.png,"a man\nb.png,"a dog"\n', ["line 2", "expected after"]),
        ('a.png,"a man"s dog"\n', ["line 2", 'write "" for one']),
        ('a.png,"a man\nb.png,"\n', ["line 2", "look like further rows"]),
        ('\na.png,x\n\nb.png,"1\n2"\nc.png\n', ["line 7 has 1 field"]),
    ],
)
def test_a_csv_row_that_does_not_fit_is_refused_with_its_line(rows, words):
    with pytest.raises(TableError) as caught:
        list(csv_rows("url,caption\n" + rows))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_header_that_names_a_column_twice_is_refused():
    with pytest.raises(TableError, match=r"line 1: the header has the column 'caption' twice"):
        list(csv_rows("url,caption,caption\n"))


def test_quoted_values_blank_lines_and_empty_cells_are_read():
    text = '\n url , caption\n\na.png,"a man, ""the"" dog\nand, a tree"\n   \n,nobody\nc.png,\n'
    assert list(csv_rows(text)) == [
        (4, {"url": "a.png", "caption": 'a man, "the" dog\nand, a tree'}),
        (7, {"url": "", "caption": "nobody"}),
        (8, {"url": "c.png", "caption": ""}),
    ]


def test_json_rows_have_their_lines():
    assert list(json_rows('{"a": 1}\n\n{"a": 2}\n')) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(json_rows('[{"a": 1}, {"a": 2}]')) == [(1, {"a": 1}), (2, {"a": 2})]
    for text, words in (
        ("{}\n[1]", "line 2 is no object"),
        ("{}\n{", "line 2 is no JSON object"),
        ("[", "no JSON list"),
    ):
        with pytest.raises(TableError, match=words):
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
def test_text_bytes_and_lists_of_them_are_captions(value, texts):
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
        (b"\xff\xfe\xfa", "bytes that are no UTF-8 text"),
        (b"caf\xe9", "bytes that are no UTF-8 text"),
    ],
)
def test_other_cells_are_refused_with_column_and_type(value, kind):
    with pytest.raises(TableError) as caught:
        cell_texts(value, "label")
    assert str(caught.value).startswith(f"column 'label' holds {kind}")


def test_names_may_be_numbers_and_nothing_else_but_text():
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
        with pytest.raises(TableError, match="column 'id' holds"):
            name_text(value, "id")


@pytest.mark.parametrize(
    ("name", "words"),
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
def test_the_likely_cause_of_an_unmatched_name(name, words):
    known = {"0.png", "x/1.png"}
    cause = likely_cause(name, known.__contains__, known)
    assert words in cause
    assert bool(cause) == bool(words)


def test_unmatched_rows_are_counted_by_cause_with_examples():
    names = {f"train/{number}": 2 for number in range(5)} | {"x": 1}
    causes = unmatched_notes("t.csv", names, lambda name: "the folder" if "/" in name else "")
    assert list(causes) == [
        "10 rows of t.csv without a matching image, such as 'train/0', 'train/1', 'train/2', ...: the folder.",
        "1 row of t.csv without a matching image, such as 'x'.",
    ]
