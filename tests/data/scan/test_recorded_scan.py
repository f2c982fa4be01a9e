"""Tests of the recorded scan: a rescan reads only new and changed files, and equals a first scan."""

import logging
import os
import shutil
import time

import pandas as pd
import pytest

from sdxl_pipeline.data.scan import dataset_scan, image_reader
from sdxl_pipeline.data.scan.dataset_scan import NOT_SAMPLED, load_recorded_dataset, scan_dataset
from tests.support.photographs import encoded

OLD_TIME = 1_600_000_000


def write(path, data: bytes, mtime: float = OLD_TIME) -> None:
    path.write_bytes(data)
    os.utime(path, (mtime, mtime))


def captions(scanned: pd.DataFrame) -> dict[str, list[str]]:
    return dict(zip(scanned["path"], scanned["captions"], strict=True))


@pytest.fixture
def images(folder, photograph):
    """Write three images with captions and old modification times."""
    for number in range(3):
        write(folder / f"{number}.png", encoded(photograph.rotate(number), "PNG"))
        write(folder / f"{number}.txt", f"caption {number}".encode())
    return folder


@pytest.fixture
def record(tmp_path):
    return tmp_path / "work" / "scan.parquet"


@pytest.fixture
def files_read(monkeypatch, images):
    """Return the list of files that scans read."""
    names: list[str] = []

    def recording(original):
        def read(path):
            names.append(os.path.relpath(path, images))
            return original(path)

        return read

    for function in ("read_image", "read_text"):
        monkeypatch.setattr(dataset_scan, function, recording(getattr(image_reader, function)))
    return names


@pytest.fixture
def rescan(make_dataset, images, record, files_read):
    """Return a function that scans with a record, compares with a scan without one, and gives the table and the files read."""

    def run(settings=None, **options):
        dataset = make_dataset(**({"caption_strategy": "textfile"} | (settings or {})))
        files_read.clear()
        scanned = scan_dataset(dataset, images, recorded=record, **options)
        read = sorted(files_read)
        pd.testing.assert_frame_equal(scanned, scan_dataset(dataset, images, **options))
        return scanned, read

    return run


ALL = ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt"]


def test_rescan_unchanged_folder_reads_no_file(rescan, record):
    assert rescan()[1] == ALL
    written = record.stat().st_mtime_ns
    assert rescan()[1] == []
    assert record.stat().st_mtime_ns == written
    assert rescan(verify=True)[1] == ALL


def test_rescan_reads_only_changed_files(rescan, images, photograph):
    rescan()
    write(images / "0.txt", b"edited caption 0")
    assert rescan()[1] == ["0.txt"]
    write(images / "1.png", encoded(photograph.rotate(90), "PNG"))
    write(images / "new.png", encoded(photograph, "PNG"))
    write(images / "new.txt", b"new")
    assert rescan()[1] == ["1.png", "new.png", "new.txt"]
    (images / "0.png").unlink()
    (images / "2.txt").unlink()
    scanned, read = rescan()
    assert read == []
    assert scanned.set_index("path")["reason"].to_dict() == {
        "0.txt": "caption without image",
        "1.png": "",
        "2.png": "no caption file",
        "new.png": "",
    }


def test_rescan_detects_change_of_size_time_or_inode(rescan, images):
    rescan()
    same_length = images / "0.txt"
    write(same_length, b"captioN 0", OLD_TIME + 1)
    assert rescan()[1] == ["0.txt"]
    write(images / "1.txt", b"longer caption 1")
    assert rescan()[1] == ["1.txt"]
    new_file = images / "new"
    write(new_file, b"captioN 2")
    new_file.replace(images / "2.txt")
    assert rescan()[1] == ["2.txt"]
    assert captions(rescan()[0]) == {
        "0.png": ["captioN 0"],
        "1.png": ["longer caption 1"],
        "2.png": ["captioN 2"],
    }


def test_rescan_verify_detects_edit_with_unchanged_metadata(make_dataset, images, record):
    dataset = make_dataset(caption_strategy="textfile")
    scan_dataset(dataset, images, recorded=record)
    write(images / "0.txt", b"captioN 0")
    assert captions(scan_dataset(dataset, images, recorded=record))["0.png"] == ["caption 0"]
    assert captions(scan_dataset(dataset, images, recorded=record, verify=True))["0.png"] == ["captioN 0"]
    assert captions(scan_dataset(dataset, images, recorded=record))["0.png"] == ["captioN 0"]


def test_rescan_detects_swapped_files(rescan, images, photograph):
    size = max((images / f"{number}.png").stat().st_size for number in range(2))
    for number in range(2):
        data = (images / f"{number}.png").read_bytes()
        write(images / f"{number}.png", data + bytes(size - len(data)))
    before = rescan()[0].set_index("path")["key"]
    (images / "0.png").rename(images / "x")
    (images / "1.png").rename(images / "0.png")
    (images / "x").rename(images / "1.png")
    after = rescan()[0].set_index("path")["key"]
    assert (
        [after["0.png"], after["1.png"]]
        == [before["1.png"], before["0.png"]]
        != [before["0.png"], before["1.png"]]
    )


def test_rescan_reads_recently_changed_files_until_settled(rescan, images):
    now = time.time()
    write(images / "0.txt", b"caption 0", now - 0.5)
    write(images / "1.png", (images / "1.png").read_bytes(), now + 3600)  # a wrong clock
    assert rescan()[1] == ALL
    assert rescan()[1] == ["0.txt", "1.png"]
    # an edit of the same length within the same clock tick is detected
    write(images / "0.txt", b"captioN 0", now - 0.5)
    assert captions(rescan()[0])["0.png"] == ["captioN 0"]
    os.utime(images / "0.txt", (OLD_TIME, OLD_TIME))
    assert rescan()[1] == ["0.txt", "1.png"]
    assert rescan()[1] == ["1.png"]


def test_rescan_reads_unreadable_files_again(rescan, images, photograph):
    write(images / "cut.png", encoded(photograph, "PNG")[:500])
    (images / "odd.png").symlink_to("/proc/self/mem")
    rescan()
    scanned, read = rescan()
    assert read == ["cut.png", "odd.png"]
    assert set(scanned["reason"]) == {"", "truncated", "cannot be read: Input/output error"}


def test_rescan_other_caption_settings_read_no_image(rescan):
    filters = {"caption_filter_list": ["caption "], "missing_captions": "empty"}
    rescan({"caption_strategy": "filename"})
    assert rescan()[1] == ["0.txt", "1.txt", "2.txt"]  # first read of these files
    scanned, read = rescan(filters)
    assert (captions(scanned), read) == ({"0.png": ["0"], "1.png": ["1"], "2.png": ["2"]}, [])
    prefix = {"instance_prompt": "sks", "prepend_instance_prompt": True}
    scanned, read = rescan(prefix)
    assert (captions(scanned)["1.png"], read) == (["sks caption 1"], [])
    assert rescan({"caption_strategy": "filename"})[1] == []
    assert rescan()[1] == []


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1 and then nothing of it PAR1"])
def test_rescan_corrupt_record_is_ignored_with_warning(rescan, record, caplog, data):
    rescan()
    record.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert rescan()[1] == ALL
    assert "cannot be used, every file is read again" in caplog.text
    assert rescan()[1] == []


def test_rescan_record_of_other_version_is_ignored(rescan, record, caplog, monkeypatch):
    rescan()
    pd.DataFrame({"path": ["0.png"], "key": ["x"]}).to_parquet(record)
    with caplog.at_level(logging.INFO):
        assert rescan()[1] == ALL
    assert "was recorded by another version" in caplog.text
    monkeypatch.setattr("sdxl_pipeline.data.scan.recorded_scan._FORMAT", 99)
    assert rescan()[1] == ALL


def test_rescan_record_of_other_folder_is_ignored(make_dataset, images, record, tmp_path, files_read):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    dataset = make_dataset(caption_strategy="textfile")
    scan_dataset(dataset, images, recorded=record)
    files_read.clear()
    scan_dataset(dataset, other, recorded=record)
    assert len(files_read) == len(ALL)
    assert load_recorded_dataset(dataset, images, record) is None


def test_rescan_source_captions_and_failures_become_rows(rescan, make_dataset, images, record):
    source = {
        "captions": {"0.png": ("from", "a column"), "1.png": ("",), "gone.png": ("x",)},
        "failed": [("https://example.org/a.png", "404 Not Found"), ("0000", "not an image")],
    }
    settings = {"type": "csv", "csv_file": "list.csv", "caption_strategy": "csv"}
    scanned, _ = rescan(settings, **source)
    assert scanned["path"].is_monotonic_increasing
    assert captions(scanned)["0.png"] == ["from", "a column"]
    reasons = scanned.set_index("path")["reason"].to_dict()
    assert reasons == {
        "0.png": "",
        "0000": "not an image",
        "1.png": "caption is empty",
        "2.png": "no caption in the list",
        "https://example.org/a.png": "404 Not Found",
    }
    assert (scanned["status"] == "dropped").sum() == 4
    pd.testing.assert_frame_equal(scanned, rescan(settings, **source)[0])
    # the record alone gives the same frame
    pd.testing.assert_frame_equal(load_recorded_dataset(make_dataset(**settings), images, record), scanned)
    del source["captions"]["0.png"]
    assert captions(rescan(settings, **source)[0])["0.png"] == []
    column = make_dataset(**settings, csv_caption_column="other")
    assert (
        load_recorded_dataset(column, images, record) is None
    )  # the recorded captions are from another column


def test_scan_dataset_empty_folder_with_failures_gives_rows(make_dataset, folder):
    scanned = scan_dataset(make_dataset(), folder, failed=[("a.png", "timed out")])
    assert scanned[["path", "status", "reason"]].values.tolist() == [["a.png", "dropped", "timed out"]]


def test_load_recorded_dataset_reads_no_file(make_dataset, images, record, files_read):
    dataset = make_dataset(caption_strategy="textfile")
    assert load_recorded_dataset(dataset, images, record) is None
    scanned = scan_dataset(dataset, images, recorded=record)
    shutil.rmtree(images)
    files_read.clear()
    pd.testing.assert_frame_equal(load_recorded_dataset(dataset, images, record), scanned)
    prefixed = make_dataset(caption_strategy="textfile", instance_prompt="sks", prepend_instance_prompt=True)
    assert captions(load_recorded_dataset(prefixed, images, record))["0.png"] == ["sks caption 0"]
    assert files_read == []


def test_load_recorded_dataset_without_captions_returns_none(make_dataset, images, record):
    scan_dataset(make_dataset(), images, recorded=record)
    assert load_recorded_dataset(make_dataset(), images, record) is not None
    assert load_recorded_dataset(make_dataset(caption_strategy="textfile"), images, record) is None


def test_scan_dataset_max_num_samples_selects_by_content(make_dataset, folder, photograph):
    for number in range(12):
        (folder / f"{number}.png").write_bytes(encoded(photograph.rotate(number), "PNG"))

    def kept(count: int) -> set[str]:
        scanned = scan_dataset(make_dataset(max_num_samples=count), folder)
        assert set(scanned["reason"]) <= {"", NOT_SAMPLED}
        return set(scanned.loc[scanned["status"] == "kept", "key"])

    five = kept(5)
    assert len(five) == 5
    assert five < kept(8)
    assert len(kept(100)) == 12
    for number in range(12):  # names do not matter
        (folder / f"{number}.png").rename(folder / f"renamed {11 - number}.png")
    assert kept(5) == five
    selected_paths = {path for path in folder.iterdir() if scan_key(path) in five}
    next(iter({*folder.iterdir()} - selected_paths)).unlink()
    assert kept(5) == five


def scan_key(path) -> str:
    return image_reader.read_image(str(path)).key
