"""Tests of caption tables: matching by path or file name, several captions, notes and errors."""

import json

import pandas as pd
import pytest

from sdxl_pipeline.data.captions.caption_tables import captions_from_table
from sdxl_pipeline.data.captions.text_files import CaptionError
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from tests.support.photographs import encoded


@pytest.fixture
def captions_of(make_dataset, folder):
    """Return a function that writes a table of rows and gives captions and status by image."""

    def scan(rows: list[dict], images: list[str], name: str = "table.parquet", **settings):
        path = folder / name
        if name.endswith(".parquet"):
            pd.DataFrame(rows).to_parquet(path)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows), encoding="utf-8-sig")
        else:
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        dataset = make_dataset(caption_strategy="parquet", parquet={"path": name, **settings})
        return captions_from_table(dataset, folder, images)

    return scan


@pytest.mark.parametrize("name", ["table.parquet", "table.jsonl", "table.json"])
def test_captions_from_table_match_by_path_or_file_name(captions_of, folder, name):
    rows = [
        {"filename": "a", "caption": "top"},
        {"filename": "deep/b", "caption": "by path"},
        {"filename": "c", "caption": "by bare name"},
        {"filename": "./d.png", "caption": "with its extension"},
        {"filename": str(folder / "deep" / "e"), "caption": "absolute"},
        {"filename": "gone", "caption": "of no image"},
    ]
    images = ["a.png", "a.jpg", "deep/b.png", "deep/c.png", "d.png", "deep/e.webp", "f.png"]
    assert captions_of(rows, images, name) == {
        "a.png": (("top",), "ok"),
        "a.jpg": (("top",), "ok"),
        "deep/b.png": (("by path",), "ok"),
        "deep/c.png": (("by bare name",), "ok"),
        "d.png": (("with its extension",), "ok"),
        "deep/e.webp": (("absolute",), "ok"),
        "f.png": ((), "missing"),
    }


def test_captions_from_table_shared_file_name_is_ambiguous(captions_of):
    rows = [{"filename": "1", "caption": "one"}, {"filename": "2", "caption": "two"}]
    found = captions_of(rows, ["x/1.png", "y/1.png", "2.png", "y/2.png"])
    assert found["x/1.png"] == found["y/1.png"] == found["y/2.png"] == ((), "ambiguous")
    assert found["2.png"] == (("two",), "ok")


def test_captions_from_table_extension_distinguishes_images(captions_of):
    rows = [
        {"filename": "a.png", "caption": "png"},
        {"filename": "a.jpg", "caption": "jpg"},
        {"filename": "b"},
    ]
    found = captions_of(rows, ["a.png", "a.jpg", "b.png"], identifier_includes_extension=True)
    assert found == {"a.png": (("png",), "ok"), "a.jpg": (("jpg",), "ok"), "b.png": ((), "missing")}


def test_captions_from_table_numeric_names_match_files(captions_of):
    columns = {"filename_column": "id"}
    assert captions_of([{"id": 7, "caption": "seven"}], ["7.png"], **columns)["7.png"] == (("seven",), "ok")
    gaps = [{"id": 7, "caption": "seven"}, {"id": None, "caption": "nobody"}]  # floats in Parquet
    assert captions_of(gaps, ["7.png"], **columns)["7.png"] == (("seven",), "ok")


def test_captions_from_table_columns_lists_and_rows_are_combined(captions_of):
    rows = [
        {"filename": "a", "short": "s", "long": ["l 1", "l 2 "], "tags": "unused"},
        {"filename": "a", "short": "again", "long": None, "tags": None},
        {"filename": "b", "short": " ", "long": [], "tags": "tags"},
        {"filename": "c", "short": None, "long": None, "tags": None},
    ]
    columns = {"caption_column": ["short", "long"], "fallback_caption_column": "tags"}
    for name in ("table.parquet", "table.jsonl"):
        assert captions_of(rows, ["a.png", "b.png", "c.png"], name, **columns) == {
            "a.png": (("s", "l 1", "l 2", "again"), "ok"),
            "b.png": (("tags",), "ok"),
            "c.png": ((), "ok"),
        }


def test_captions_from_table_unicode_normal_forms_match(captions_of):
    rows = [{"filename": "caf\u00e9", "caption": "composed"}]
    assert captions_of(rows, ["cafe\u0301.png"])["cafe\u0301.png"] == (("composed",), "ok")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.parquet", None, r"file .*gone\.parquet does not exist\. Write the table's path"),
        ("odd.parquet", b"no parquet", "cannot be read as Parquet"),
        ("odd.jsonl", b'{"filename": "a", "caption": "b"}\n{', r"line 2 is not valid JSON"),
        ("list.jsonl", b"3", "line 1 is not a JSON object"),
        ("odd.json", b"[", "is not a valid JSON list"),
        ("latin.jsonl", b'{"filename": "caf\xe9"}', "neither UTF-8"),
        (
            "columns.jsonl",
            b'{"file": "a", "text": "b"}',
            r"has no column filename, caption; it has file, text\.",
        ),
    ],
)
def test_captions_from_table_invalid_table_raises(make_dataset, folder, name, data, message):
    if data is not None:
        (folder / name).write_bytes(data)
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": name})
    with pytest.raises(CaptionError, match=message) as raised:
        captions_from_table(dataset, folder, ["a.png"])
    assert f"dataset 'photos' in multidatabackend.json: parquet.path '{name}'" in str(raised.value)


def test_scan_dataset_caption_table_gives_captions_and_reasons(make_dataset, folder, photograph):
    for name in ("1.png", "2.png", "x/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(photograph, "PNG"))
    pd.DataFrame({"id": [1, 2], "caption": ["one", ""]}).to_parquet(folder / "t.parquet")
    table = {"path": "t.parquet", "filename_column": "id"}
    scanned = scan_dataset(make_dataset(caption_strategy="parquet", parquet=table), folder).set_index("path")
    assert scanned["captions"].to_dict() == {"1.png": ["one"], "2.png": [], "t.parquet": [], "x/1.png": []}
    assert scanned["reason"].to_dict() == {
        "1.png": "",
        "2.png": "caption is empty",
        "t.parquet": "caption table",
        "x/1.png": "caption table has a file name without folder that several images share",
    }


def notes(dataset, folder, images, others=()):
    found: list[str] = []
    captions_from_table(dataset, folder, images, others, found.append)
    return found


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_captions_from_table_unmatched_rows_are_noted_with_cause(make_dataset, folder, name):
    rows = [
        {"filename": "a", "caption": "fine"},
        {"filename": "train/a.png", "caption": "1"},
        {"filename": "x\\b.png", "caption": "2"},
        {"filename": None, "caption": "3"},
        {"filename": "corrupt.png", "caption": "dropped for another reason"},
    ]
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": name})
    assert notes(dataset, folder, ["a.png", "x/b.png"], ["corrupt.png"]) == [
        f"1 row of {name} without a value in column 'filename', at line 4: their captions are unused.",
        f"1 row of {name} without a matching image, such as 'train/a.png': the paths begin with 'train/', which is not below the "
        "folder; leave it out.",
        f"1 row of {name} without a matching image, such as 'x\\\\b.png': the paths have backslashes; write forward slashes.",
    ]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"short": "a cat"}, "column 'caption' has objects"),
        ([["a cat"]], "column 'caption' has lists within lists"),
        (True, "column 'caption' has true or false"),
        (3, "column 'caption' has numbers"),
        (b"\xff", "column 'caption' has bytes"),
    ],
)
def test_captions_from_table_non_text_cells_raise(make_dataset, folder, cell, message):
    pd.DataFrame({"filename": ["a"], "caption": [cell]}).to_parquet(folder / "t.parquet")
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": "t.parquet"})
    with pytest.raises(CaptionError, match=message) as caught:
        captions_from_table(dataset, folder, ["a.png"])
    assert "'photos'" in str(caught.value)
    assert "row 1" in str(caught.value)


def test_captions_from_table_utf_8_bytes_are_text(captions_of):
    assert captions_of([{"filename": b"a", "caption": "K\u00e4se".encode()}], ["a.png"])["a.png"] == (
        ("Käse",),
        "ok",
    )
