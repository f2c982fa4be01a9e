"""Captions from a table: by path or bare name, with or without extension, several of them, and never another image's."""

import json

import pandas as pd
import pytest

from sdxl_pipeline.data.captions.caption_tables import captions_from_table
from sdxl_pipeline.data.captions.text_files import CaptionError
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from tests.support.photographs import encoded


@pytest.fixture
def look_up(make_dataset, folder):
    """Captions and status by image, from a table of these rows."""

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
def test_rows_are_found_by_path_and_by_bare_name(look_up, folder, name):
    rows = [
        {"filename": "a", "caption": "top"},
        {"filename": "deep/b", "caption": "by path"},
        {"filename": "c", "caption": "by bare name"},
        {"filename": "./d.png", "caption": "with its extension"},
        {"filename": str(folder / "deep" / "e"), "caption": "absolute"},
        {"filename": "gone", "caption": "of no image"},
    ]
    images = ["a.png", "a.jpg", "deep/b.png", "deep/c.png", "d.png", "deep/e.webp", "f.png"]
    assert look_up(rows, images, name) == {
        "a.png": (("top",), "ok"),
        "a.jpg": (("top",), "ok"),
        "deep/b.png": (("by path",), "ok"),
        "deep/c.png": (("by bare name",), "ok"),
        "d.png": (("with its extension",), "ok"),
        "deep/e.webp": (("absolute",), "ok"),
        "f.png": ((), "missing"),
    }


def test_a_bare_name_of_several_images_is_nobodys_but_the_one_at_the_top(look_up):
    rows = [{"filename": "1", "caption": "one"}, {"filename": "2", "caption": "two"}]
    found = look_up(rows, ["x/1.png", "y/1.png", "2.png", "y/2.png"])
    assert found["x/1.png"] == found["y/1.png"] == found["y/2.png"] == ((), "ambiguous")
    assert found["2.png"] == (("two",), "ok")


def test_names_with_extension_tell_images_apart(look_up):
    rows = [
        {"filename": "a.png", "caption": "png"},
        {"filename": "a.jpg", "caption": "jpg"},
        {"filename": "b"},
    ]
    found = look_up(rows, ["a.png", "a.jpg", "b.png"], identifier_includes_extension=True)
    assert found == {"a.png": (("png",), "ok"), "a.jpg": (("jpg",), "ok"), "b.png": ((), "missing")}


def test_numbers_name_files_as_they_are_written(look_up):
    columns = {"filename_column": "id"}
    assert look_up([{"id": 7, "caption": "seven"}], ["7.png"], **columns)["7.png"] == (("seven",), "ok")
    gaps = [{"id": 7, "caption": "seven"}, {"id": None, "caption": "nobody"}]  # floats in Parquet
    assert look_up(gaps, ["7.png"], **columns)["7.png"] == (("seven",), "ok")


def test_columns_lists_and_rows_are_several_captions_and_the_fallback_is_for_empty_ones(look_up):
    rows = [
        {"filename": "a", "short": "s", "long": ["l 1", "l 2 "], "tags": "unused"},
        {"filename": "a", "short": "again", "long": None, "tags": None},
        {"filename": "b", "short": " ", "long": [], "tags": "tags"},
        {"filename": "c", "short": None, "long": None, "tags": None},
    ]
    columns = {"caption_column": ["short", "long"], "fallback_caption_column": "tags"}
    for name in ("table.parquet", "table.jsonl"):
        assert look_up(rows, ["a.png", "b.png", "c.png"], name, **columns) == {
            "a.png": (("s", "l 1", "l 2", "again"), "ok"),
            "b.png": (("tags",), "ok"),
            "c.png": ((), "ok"),
        }


def test_accents_match_however_they_are_encoded(look_up):
    rows = [{"filename": "caf\u00e9", "caption": "composed"}]
    assert look_up(rows, ["cafe\u0301.png"])["cafe\u0301.png"] == (("composed",), "ok")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.parquet", None, r"there is no file .*gone\.parquet\. Write the table's path"),
        ("odd.parquet", b"no parquet", "cannot be read as Parquet"),
        ("odd.jsonl", b'{"filename": "a", "caption": "b"}\n{', r"line 2 is no JSON object"),
        ("list.jsonl", b"3", "line 1 is no object"),
        ("odd.json", b"[", "is no JSON list"),
        ("latin.jsonl", b'{"filename": "caf\xe9"}', "neither UTF-8"),
        (
            "columns.jsonl",
            b'{"file": "a", "text": "b"}',
            r"has no column filename, caption; it has file, text\.",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_name(make_dataset, folder, name, data, message):
    if data is not None:
        (folder / name).write_bytes(data)
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": name})
    with pytest.raises(CaptionError, match=message) as raised:
        captions_from_table(dataset, folder, ["a.png"])
    assert f"dataset 'photos' in multidatabackend.json: parquet.path '{name}'" in str(raised.value)


def test_a_scan_takes_its_captions_from_the_table_and_accounts_for_it(make_dataset, folder, photograph):
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
        "x/1.png": "caption table names several images by this bare name",
    }


def notes(dataset, folder, images, others=()):
    found: list[str] = []
    captions_from_table(dataset, folder, images, others, found.append)
    return found


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_rows_of_no_image_are_counted_with_their_cause(make_dataset, folder, name):
    rows = [
        {"filename": "a", "caption": "fine"},
        {"filename": "train/a.png", "caption": "1"},
        {"filename": "x\\b.png", "caption": "2"},
        {"filename": None, "caption": "3"},
        {"filename": "damaged.png", "caption": "dropped for another reason"},
    ]
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(folder / name)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": name})
    assert notes(dataset, folder, ["a.png", "x/b.png"], ["damaged.png"]) == [
        f"1 row of {name} without a value in column 'filename', at line 4: no image gets what they hold.",
        f"1 row of {name} without a matching image, such as 'train/a.png': the paths begin with 'train/', which is not below the "
        "folder; leave it out.",
        f"1 row of {name} without a matching image, such as 'x\\\\b.png': the paths have backslashes; write forward slashes.",
    ]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"short": "a cat"}, "column 'caption' holds objects"),
        ([["a cat"]], "column 'caption' holds lists within lists"),
        (True, "column 'caption' holds true or false"),
        (3, "column 'caption' holds numbers"),
        (b"\xff", "column 'caption' holds bytes"),
    ],
)
def test_cells_that_are_no_text_are_refused(make_dataset, folder, cell, words):
    pd.DataFrame({"filename": ["a"], "caption": [cell]}).to_parquet(folder / "t.parquet")
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": "t.parquet"})
    with pytest.raises(CaptionError, match=words) as caught:
        captions_from_table(dataset, folder, ["a.png"])
    assert "'photos'" in str(caught.value)
    assert "row 1" in str(caught.value)


def test_bytes_of_utf_8_are_captions(look_up):
    assert look_up([{"filename": b"a", "caption": "K\u00e4se".encode()}], ["a.png"])["a.png"] == (
        ("Käse",),
        "ok",
    )
