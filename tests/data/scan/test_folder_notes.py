"""Tests of notes on unused content of a folder: caption files, tables, and kohya's folders of repeats."""

import pytest

from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.data.scan.folder_notes import local_notes
from tests.support.photographs import encoded


@pytest.fixture
def notes(make_dataset, folder, photograph):
    """Return a function that writes files and gives the notes of a scan, after comparing them with `local_notes`."""

    def notes(*names: str, **settings) -> list[str]:
        for number, name in enumerate(names):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photograph.rotate(number), "PNG") if name.endswith(".png") else b"a cat")
        dataset = make_dataset(**settings)
        found: list[str] = []
        scan_dataset(dataset, folder, on_note=found.append)
        assert found == local_notes(dataset)
        return found

    return notes


def test_folder_notes_unused_text_files_are_counted(notes):
    assert notes("a.png", "a.txt", "b.png", "b.caption", "c.txt") == [
        "2 text files are stored beside images and not read; write caption_strategy: textfile."
    ]
    assert notes("a.png", "a.txt", caption_strategy="textfile") == []
    assert notes("a.png", "a.txt", caption_strategy="instanceprompt", instance_prompt="a") == []


def test_folder_notes_unused_caption_table_is_reported(notes):
    (note,) = notes("a.png", "metadata.jsonl")
    assert note.startswith(
        "metadata.jsonl is not read; if it holds captions, write caption_strategy: parquet"
    )


def test_folder_notes_shadowed_caption_file_is_reported(notes):
    (note,) = notes("a.png", "a.txt", "a.caption", caption_strategy="textfile")
    assert note.startswith("1 caption file is not read, such as a.caption")


def test_folder_notes_kohya_folders_give_entry_to_write(notes, folder):
    names = [
        "img/10_sks dog/a.png",
        "img/10_sks dog/deep/b.png",
        "img/1_cat/c.png",
        "reg/1_dog/d.png",
        "2024_06/e.png",
        "02_more/f.png",
    ]
    assert notes(*names) == [
        f"folder img/10_sks dog (2 images): the repeats in its name, as kohya's trainers write them, are ignored; write "
        f'"repeats": 9 in a separate entry with "instance_data_dir": "{folder}/img/10_sks dog".',
        f"folder reg/1_dog (1 images): the repeats in its name, as kohya's trainers write them, are ignored; write "
        f'"repeats": 0 and "is_regularisation_data": true in a separate entry with "instance_data_dir": "{folder}/reg/1_dog".',
    ]


def test_folder_notes_matching_repeats_give_no_note(notes, make_dataset, folder):
    (note,) = notes("10_dog/a.png")
    assert note.endswith('write "repeats": 9 in this entry.')
    assert notes("10_dog/a.png", repeats=9) == []
    (note,) = local_notes(make_dataset(instance_data_dir=folder / "10_dog"))
    assert note.endswith('write "repeats": 9 in this entry.')
    assert local_notes(make_dataset(instance_data_dir=folder / "10_dog", repeats=9)) == []


def test_local_notes_missing_folder_gives_no_notes(make_dataset, folder):
    assert local_notes(make_dataset(instance_data_dir=folder / "gone")) == []


def test_local_notes_report_problems_of_tables(notes, make_dataset, folder):
    notes("a.png")
    table = folder / "t.jsonl"
    dataset = make_dataset(caption_strategy="parquet", parquet={"path": "t.jsonl"})
    (missing,) = local_notes(dataset)
    assert "does not exist" in missing
    table.write_text('{"filename": "train/a", "caption": "a"}')
    (unmatched,) = local_notes(dataset)
    assert (
        "1 row of t.jsonl without a matching image, such as 'train/a': the paths begin with 'train/'"
        in unmatched
    )
    table.write_text('{"filename": "a", "caption": true}')
    (wrong,) = local_notes(dataset)
    assert "row 1: column 'caption' has true or false, not text" in wrong
    list_dataset = make_dataset(
        type="csv", csv_file=folder / "list.csv", instance_data_dir=None, caption_strategy="csv"
    )
    assert local_notes(list_dataset) == []
    (folder / "list.csv").write_text("url,caption\na.png,a man, a dog\n")
    (wrong,) = local_notes(list_dataset)
    assert "line 2 has 3 fields, and the header has 2" in wrong
